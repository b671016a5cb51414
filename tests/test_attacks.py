"""What a hostile visitor sends to a real server, and what the server lets out."""

from __future__ import annotations

import dataclasses
import json

import pytest
from page_client import PageClient

MARK = {"meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def address(serve, films) -> str:
    return serve(films)


@pytest.fixture
def client(address):
    client = PageClient(address)
    yield client
    client.close()


def ask_for_film(client: PageClient, *data) -> str:
    """What `/film` answers."""
    number = client.http.post(client.address + "call/film", json={"data": list(data)}).json()["event_id"]
    return client.http.get(client.address + f"call/film/{number}").text


# --------------------------------------------------------------------------------------------------------------- paths


@pytest.fixture
def forged(client, picture, tmp_path):
    """Pictures on the server's disk as a request could name them."""
    there = client.upload(picture)["path"]
    folder = there.rsplit("/", 2)[0]
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture.read_bytes())
    paths = [str(secret), f"{folder}/../../../../../../../..{secret}", f"{there}/../../../../../../../../..{secret}"]
    forms = [{"path": path, **more} for path in paths for more in ({}, MARK, {"meta": {}}, {"meta": None})]
    forms += [{"path": str(secret), "url": there}, {"path": str(secret), "is_stream": True, **MARK}, str(secret)]
    forms += [{"path": there, "url": f"file://{secret}", "meta": {}, "path ": there, "orig_name": "x"} | {"path": ""}]
    return forms


def test_a_picture_on_the_servers_disk_cannot_be_named(client, forged, films):
    for file in forged:
        before = set(films.iterdir())
        answer = ask_for_film(client, file, "", 81, 0, "", "", "")
        assert "event: error" in answer and "event: complete" not in answer, file
        for name, event in (("picture", "change"), ("generate", "click")):
            number = client.start(name, event, picture=file)
            last = client.wait(number)
            assert not last["success"] and "image/png" not in client.said(number), (file, name)
        assert set(films.iterdir()) == before


def test_a_session_on_the_servers_disk_cannot_be_named(client, picture, films, tmp_path):
    number = client.start("generate", picture=client.upload(picture))
    assert client.wait(number)["success"]
    (session,) = films.glob("*/session.safetensors")
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes(session.read_bytes())
    for path in (session, secret):
        for more in ({}, MARK, {"meta": {}}):
            number = client.start("resume", "upload", resume={"path": str(path), **more})
            assert not client.wait(number)["success"], (path, more)
    number = client.start("resume", "upload", resume=client.upload(secret))
    assert client.wait(number)["success"] and "161 frames" in client.said(number)


def test_a_refusal_does_not_tell_whether_a_file_is_there(client, tmp_path):
    (tmp_path / "there.png").write_bytes(b"a")
    answers = []
    for name in ("there.png", "not there.png"):
        number = client.start("picture", "change", picture={"path": str(tmp_path / name)})
        answers.append(json.dumps(client.wait(number)["output"]))
    assert answers[0] == answers[1] and str(tmp_path) not in answers[0]
    assert "not uploaded to this server" in answers[0]


def test_a_link_among_the_uploads_is_not_followed(client, picture, tmp_path):
    there = client.upload(picture)
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture.read_bytes())
    from pathlib import Path

    link = Path(there["path"]).with_name("link.png")
    link.symlink_to(secret)
    for more in ({}, MARK):
        assert "event: error" in ask_for_film(client, {"path": str(link), **more}, "", 81, 0, "", "", "")


# ---------------------------------------------------------------------------------------------------------------- words

HTML = '<form action="http://evil"><a href="//evil">log in</a></form>'


@pytest.mark.parametrize("name", ["plain", "<a href=evil>film<a>"])
def test_words_of_a_file_are_not_read_as_html(client, world, picture, tmp_path, name):
    session = dataclasses.replace(world.start(picture), model=HTML)
    session.save(tmp_path / f"{name}.safetensors")
    number = client.start("resume", "upload", resume=client.upload(tmp_path / f"{name}.safetensors"))
    message = client.wait(number)["output"]["error"]
    assert "<" not in message and "&lt;form action=" in message, message
    (tmp_path / f"{name}.png").write_text("no picture")
    number = client.start("picture", "change", picture=client.upload(tmp_path / f"{name}.png"))
    message = client.wait(number)["output"]["error"]
    assert "<" not in message and "not a picture" in message


def test_words_of_a_request_are_not_read_as_html(client, picture):
    for values in ({"model": HTML}, {"prompt": HTML, "steps": HTML}, {"picture": {"path": HTML}}):
        number = client.start("generate", **{"picture": client.upload(picture)} | values)
        client.wait(number)
        assert "<form" not in "".join(
            str(message["output"].get("error")) for message in client.messages[number] if message.get("output")
        )
