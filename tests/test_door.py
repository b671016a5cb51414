"""The door for programs: what `/film` and the MCP tool take, and what they say of anything else."""

from __future__ import annotations

import asyncio
import base64
import json
from types import SimpleNamespace

import numpy as np
import pytest
from page_client import PageClient
from PIL import Image

from infworld.actions import ActionScript
from infworld.app.inputs import answering_late
from infworld.video import read_mp4

NAMES = ("actions", "frames", "seed", "prompt", "model", "preset")
DEFAULTS = {"actions": "", "frames": 81, "seed": 0, "prompt": "", "model": "", "preset": ""}


@pytest.fixture(scope="module")
def client(address):
    return PageClient(address)


@pytest.fixture(scope="module")
def image(client, picture):
    return client.upload(picture)


def ask(client: PageClient, data: list) -> tuple[bool, str]:
    """Whether `/film` answers with a film, and its path, or what it says."""
    body = json.dumps({"data": data})  # NaN and Infinity too, as Python writes and reads them
    headers = {"Content-Type": "application/json"}
    answer = client.http.post(client.address + "call/film", content=body, headers=headers)
    if answer.status_code != 200:
        return False, answer.text
    words = client.http.get(client.address + f"call/film/{answer.json()['event_id']}").text
    event, data = words.strip().split("\n\n")[-1].split("\n")[:2]
    data = json.loads(data.removeprefix("data: "))
    return ("complete" in event, data[0]["path"]) if "complete" in event else (False, data["error"])


BAD = [
    ("actions", None, "actions must be text or a list, not null"),
    ("actions", 5, "actions must be text or a list, not 5"),
    ("actions", {"move": "no-op"}, "actions must be text or a list"),
    ("actions", [5], "action of frame 0 must be"),
    ("frames", None, "frames must be a whole number, not null"),
    ("frames", 81.5, "frames must be a whole number, not 81.5"),
    ("frames", "81.5", 'frames must be a whole number, not "81.5"'),
    ("frames", "many", 'frames must be a whole number, not "many"'),
    ("frames", [81], "frames must be a whole number, not [81]"),
    ("frames", True, "frames must be a whole number, not true"),
    ("frames", float("nan"), "frames must be a whole number, not NaN"),
    ("frames", float("inf"), "frames must be a whole number, not Infinity"),
    ("frames", "9" * 5000, "frames must be a whole number"),
    ("seed", None, "seed must be a whole number, not null"),
    ("seed", 2.7, "seed must be a whole number, not 2.7"),
    ("seed", float("nan"), "seed must be a whole number, not NaN"),
    ("seed", {}, "seed must be a whole number, not {}"),
    ("seed", -1, "seed must be a whole number from 0"),
    ("seed", 2**63, "seed must be a whole number from 0"),
    ("prompt", None, "prompt must be text, not null"),
    ("prompt", ["a", "b"], 'prompt must be text, not ["a", "b"]'),
    ("prompt", float("inf"), "prompt must be text, not Infinity"),
    ("prompt", "x" * 1001, "at most 1000 characters"),
    ("model", None, "model must be text, not null"),
    ("model", 3, "model must be text, not 3"),
    ("preset", None, "preset must be text, not null"),
    ("preset", ["fast"], "preset must be text"),
    ("preset", "hasty", "hasty"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD, ids=lambda value: str(value)[:20])
def test_a_wrong_argument_is_named(client, image, name, value, message):
    made, words = ask(client, [image, *(DEFAULTS | {name: value}).values()])
    assert not made and message in words[0].lower() + words[1:], words


@pytest.mark.parametrize(
    "wrong", ["picture.png", 5, [], {}, {"path": 5}, {"path": None}, {"url": "file:///etc/passwd"}]
)
def test_a_wrong_picture_is_named(client, wrong):
    made, words = ask(client, [wrong, *DEFAULTS.values()])
    assert not made and "not uploaded" in words


def test_no_picture_and_too_few_arguments_are_named(client):
    assert "There is no picture" in ask(client, [None, *DEFAULTS.values()])[1]
    assert "cannot be used" in ask(client, [])[1] or "input" in ask(client, [])[1]


def test_what_is_unambiguous_is_taken(client, image, world, picture):
    script = ActionScript.parse("right 81")
    made = [
        ask(client, [image, script.text(), 81, 5, "", "", ""]),
        ask(client, [image, script.to_list(), "81", "5", "", "", ""]),
        ask(client, [image, script.to_json(), 81.0, " 5 ", "", "", ""]),
        ask(client, [image, script.text(), "81.0", 5.0, "", "", ""]),
    ]
    films = [read_mp4(path) for ok, path in made if ok]
    assert len(films) == 4 and all((film == films[0]).all() for film in films)


def test_an_event_after_a_pages_last_one_is_answered_when_its_stream_has_ended():
    """Else its client may take the stream for open, and never hear of the event."""
    answered = []

    async def push(body):
        answered.append("pushed")
        return body.session_hash

    queue = SimpleNamespace(
        pending_messages_per_session={"idle", "busy"}, pending_event_ids_session={"busy": {"event"}}, push=push
    )
    push_late = answering_late(queue)

    async def fire(page: str) -> None:
        answered.append(await push_late(body=SimpleNamespace(session_hash=page)))

    async def fire_all() -> None:
        await asyncio.gather(fire("idle"), fire("busy"), fire("new"))

    asyncio.run(fire_all())
    assert answered == ["pushed", "pushed", "busy", "pushed", "new", "idle"]


# ----------------------------------------------------------------------------------------------------------------- MCP


def call_tool(address: str, *calls: dict) -> list:
    pytest.importorskip("mcp")
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def use():
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            (tool,) = (await session.list_tools()).tools
            return [await session.call_tool(tool.name, arguments) for arguments in calls]

    return asyncio.run(use())


def test_the_tool_says_what_is_wrong_with_an_argument(address, picture):
    image = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    bad = [(name, value) for name, value, _ in BAD if not isinstance(value, float) or value % 1 > 0]
    results = call_tool(address, *({"image": image, name: value} for name, value in bad))
    for (name, value), result in zip(bad, results, strict=True):
        words = result.content[0].text
        assert result.isError and "verbose" not in words and len(words) > 10, (name, value, words)


def test_the_tool_takes_numbers_in_text_lists_and_a_large_picture(address, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png", compress_level=0)  # 2.7 MB
    image = f"data:image/png;base64,{base64.b64encode((tmp_path / 'noise.png').read_bytes()).decode()}"
    actions = ActionScript.parse("right 3").to_list()
    (result,) = call_tool(address, {"image": image, "frames": "81", "seed": "5", "actions": actions})
    assert not result.isError and ".mp4" in result.content[0].text, result.content


@pytest.mark.parametrize(
    "wrong", ["/etc/passwd", "http://127.0.0.1:1/a.png", "http://169.254.169.254/a.png", "file:///etc/passwd", "data:,"]
)
def test_the_tool_says_what_is_wrong_with_an_address(address, wrong):
    (result,) = call_tool(address, {"image": wrong})
    words = result.content[0].text
    assert result.isError and words and "verbose" not in words
