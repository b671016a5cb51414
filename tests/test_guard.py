"""What a real server lets in: names, other sites, large bodies, many connections, proxies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from page_client import PageClient
from servers import free_port
from starlette.responses import PlainTextResponse

from infworld.app import server
from infworld.app.guard import JSON_BYTES, Guard, Stored
from infworld.config import PROJECT_ROOT


@pytest.fixture
def client(address):
    return PageClient(address)


def port_of(address: str) -> str:
    return re.search(r":(\d+)/", address)[1]


# --------------------------------------------------------------------------------------------------- names and sites


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_a_local_server_answers_to_this_machines_names(address, host):
    for port in ("", f":{port_of(address)}", ":1"):
        assert httpx.get(address, headers={"Host": host + port}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "10.0.0.1:80"]
)
def test_a_local_server_does_not_answer_to_other_names(address, host):
    for path in ("", "config", "gradio_api/info", "gradio_api/mcp/", "gradio_api/upload"):
        assert httpx.get(address + path, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "https://evil.example:{port}"},
        {"Origin": "null"},
        {"Origin": "http://localhost:{port}"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://127.0.0.1:{port}.evil.example"},
        {"Origin": "http://evil.example", "X-Forwarded-Host": "evil.example"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
    ],
)
def test_other_sites_cannot_change_anything(address, client, picture, headers):
    headers = {name: value.replace("{port}", port_of(address)) for name, value in headers.items()}
    with picture.open("rb") as file:
        assert httpx.post(address + "gradio_api/upload", files={"files": file}, headers=headers).status_code == 403
    body = {"data": [client.upload(picture), "", 81, 0, "", "", ""]}
    for path in ("gradio_api/call/film", "gradio_api/queue/join", "gradio_api/mcp/", "gradio_api/cancel"):
        assert httpx.post(address + path, json=body, headers=headers).status_code == 403
    if "Origin" in headers:
        assert httpx.get(address + "gradio_api/mcp/sse", headers=headers).status_code == 403
    assert httpx.get(address, headers=headers).status_code == 200  # a link to the page


def test_the_pages_own_requests_are_let_in(address, client, picture):
    own = {"Origin": address.rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    with picture.open("rb") as file:
        assert httpx.post(address + "gradio_api/upload", files={"files": file}, headers=own).status_code == 200
    assert httpx.post(address + "gradio_api/cancel", json={}, headers=own).status_code == 422  # it was read


@pytest.mark.parametrize("host", ["person-space.hf.space", "10.0.0.7:7860"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://person-space.hf.space"}, 200),
        ({"Origin": "https://films.example"}, 200),
        ({}, 200),  # a program
        ({"Origin": "https://other-space.hf.space"}, 403),
        ({"Origin": "https://person-space.hf.space.evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_a_space_lets_only_its_own_pages_change_something(monkeypatch, host, headers, status):
    monkeypatch.setenv("SPACE_HOST", "person-space.hf.space,films.example")
    guard = Guard(PlainTextResponse("done"), hosts=None, upload=0, stored=Stored(0, 0), connections=9)

    async def ask(method: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard)) as http:
            return (await http.request(method, f"http://{host}/gradio_api/queue/join", headers=headers)).status_code

    assert (asyncio.run(ask("POST")), asyncio.run(ask("GET"))) == (status, 200)


def test_the_names_of_a_server_are_those_it_was_told(monkeypatch):
    monkeypatch.delenv("GRADIO_SERVER_NAME", raising=False)
    assert server.hosts_of(None, []) == {"localhost", "127.0.0.1", "[::1]"}
    assert server.hosts_of("127.0.0.1", ["films.example"]) >= {"films.example", "localhost"}
    assert server.hosts_of("0.0.0.0", []) is None
    assert "films.example" in server.hosts_of("0.0.0.0", ["films.example"])
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")  # as on a Space
    assert server.hosts_of(None, []) is None


# -------------------------------------------------------------------------------------------------------------- bodies


def test_a_large_request_is_refused_in_words(address):
    body = json.dumps({"data": ["x" * JSON_BYTES]})
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    for path in ("call/film", "queue/join", "mcp/", "mcp/messages/"):
        for content in (body, iter([body[: 2**20].encode()] * 6)):
            answer = httpx.post(f"{address}gradio_api/{path}", content=content, headers=headers)
            assert answer.status_code == 413 and "At most 4 MB" in answer.text


def test_a_list_of_actions_of_the_longest_film_is_let_in(client, picture):
    actions = [{"move": "go forward and go left", "view": "turn down and turn right"}] * 4000
    number = client.http.post(
        client.address + "call/film", json={"data": [client.upload(picture), actions, 82, 0, "", "", ""]}
    ).json()["event_id"]
    assert "ask for 81 or 161" in client.http.get(client.address + f"call/film/{number}").text


def test_uploads_have_a_limit_each_together_and_for_one_address(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "upload_limit", lambda config: 2**20)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    address = serve(tmp_path / "films")

    def upload(size: int, content: int) -> httpx.Response:
        return httpx.post(address + "gradio_api/upload", files={"files": bytes([content]) * size})

    assert upload(3 * 2**20, 0).status_code == 413
    answers = [upload(2**20 - 2000, number) for number in range(6)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [413] * 3
    assert "no room for more uploads" in answers[-1].text


def test_uploads_are_counted_together_and_by_address():
    stored = Stored(most=100, per_client=60)
    assert stored.add("a", 60) and not stored.add("a", 1) and stored.add("b", 40) and not stored.add("c", 1)
    stored.reset(50)
    assert stored.add("a", 50) and not stored.add("b", 1)


def test_an_upload_that_cannot_be_kept_is_said(serve, tmp_path, monkeypatch, picture):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    address = serve(tmp_path / "films")
    time.sleep(0.5)
    for path in (tmp_path / "uploads").glob("*"):
        path.rmdir()
    (tmp_path / "uploads").rmdir()
    (tmp_path / "uploads").write_text("no folder")
    with picture.open("rb") as file:
        answer = httpx.post(address + "gradio_api/upload", files={"files": file})
    assert answer.status_code == 507 and "could not be kept" in answer.text


# --------------------------------------------------------------------------------------------------- as it is started


@contextlib.contextmanager
def started(*arguments: str, limit: int | None = None, log: Path, **environment: str):
    """`python app.py` in this environment, with so many open files allowed: the process, when it answers at port."""
    port = free_port()
    command = [sys.executable, "app.py", "--port", str(port), *arguments]
    lower = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))) if limit else None
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": "", **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, stderr=output, preexec_fn=lower)
    try:
        yield process, port
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def wait_for_page(process, address: str, log: Path) -> str:
    with httpx.Client(trust_env=False, timeout=30) as http:
        for _ in range(240):
            time.sleep(0.5)
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                return http.get(address).text
    raise AssertionError(log.read_text())


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_page_starts_behind_a_proxy_and_listens_on_ipv6(tmp_path):
    proxies = {"HTTP_PROXY": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1"}
    log = tmp_path / "log"
    with started("--model", "tiny", "--host", "::1", log=log, **proxies) as (process, port):
        assert "Infinite-World" in wait_for_page(process, f"http://[::1]:{port}/", log)
    assert "Traceback" not in log.read_text()


def test_behind_a_socks_proxy_many_connections_do_not_make_the_server_spin(tmp_path):
    proxies = {"ALL_PROXY": "socks5://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    log = tmp_path / "log"
    with started("--model", "tiny", limit=160, log=log, **proxies) as (process, port):
        address = f"http://127.0.0.1:{port}/"
        assert "Infinite-World" in wait_for_page(process, address, log)
        for beginning in ("GET /gradio_api/heartbeat/{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET "):
            peers = connect(port, beginning)
            server_process = psutil.Process(process.pid)
            server_process.cpu_percent()
            time.sleep(2)
            assert server_process.cpu_percent() < 60
            for peer in peers:
                peer.close()
            assert "Infinite-World" in wait_for_page(process, address, log)
    assert "Traceback" not in log.read_text() and len(log.read_bytes()) < 500_000


def connect(port: int, beginning: str) -> list[socket.socket]:
    """As many of 200 connections as can be made, each with the beginning of a request."""
    peers = []
    for number in range(200):
        with contextlib.suppress(OSError):
            peers.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            peers[-1].sendall(beginning.format(number).encode())
    return peers


@pytest.mark.parametrize("port", ["70000", "-1", "0", "http"])
def test_a_port_that_is_none_is_said(monkeypatch, capsys, port):
    monkeypatch.setattr("sys.argv", ["app.py", "--port", port])
    with pytest.raises(SystemExit, match="2"):
        server.main()
    assert "port" in capsys.readouterr().err
