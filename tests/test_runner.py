"""The runner behind a real server, with a world whose steps take their time: who waits for whom, and what is left."""

from __future__ import annotations

import copy
import json
import threading
import time

import httpx
import psutil
import pytest
from page_client import PageClient

from infworld.memory_plan import NotEnoughMemory
from infworld.progress import Progress
from infworld.video import read_mp4

STEP = 0.3  # seconds
PATIENCE = 120  # seconds; the machine may be busy


class Slow:
    """A world whose steps take `step` seconds, and which notes if two films are made at once. While `go` is not set,
    the second step of a chunk lasts on."""

    def __init__(self, world, step: float):
        self.world = copy.copy(world)
        self.step = step
        self.films = self.most = 0
        self.go = threading.Event()
        self.go.set()
        self.lock = threading.Lock()
        iterate_chunk = world.iterate_chunk

        def slow(session):
            with self.lock:
                self.films += 1
                self.most = max(self.most, self.films)
            try:
                for result in iterate_chunk(session):
                    time.sleep(self.step)
                    yield result
                    if isinstance(result, Progress) and result.step == 1:
                        assert self.go.wait(PATIENCE)
            finally:
                self.films -= 1

        self.world.iterate_chunk = slow


@pytest.fixture
def slow(world):
    slow = Slow(world, STEP)
    yield slow
    slow.go.set()


@pytest.fixture
def films(tmp_path):
    return tmp_path / "films"


@pytest.fixture
def address(serve_models, slow, films) -> str:
    return serve_models(slow.world, films)


@pytest.fixture
def client(address):
    client = PageClient(address)
    yield client
    client.close()


def generate(client: PageClient, picture, **values) -> str:
    return client.start("generate", picture=client.upload(picture), **values)


def own_threads() -> list[str]:
    """Names of the threads but for those of pools, of Gradio and of its clients, which here are in the same process."""
    pools = ("ThreadPoolExecutor", "AnyIO", "asyncio_")
    return sorted(thread.name for thread in threading.enumerate() if not thread.name.startswith(pools))


def until(condition, limit: float = PATIENCE) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_during_a_slow_step_everything_else_is_answered(client, address, picture, slow):
    slow.go.clear()
    event = generate(client, picture)
    client.wait_for(event, "step 1 of 2")
    httpx.get(address, timeout=PATIENCE).raise_for_status()
    other = PageClient(address)
    other.wait(other.start("picture", "change", picture=other.upload(picture)))
    client.wait(client.start("stop"))
    httpx.get(address, timeout=PATIENCE).raise_for_status()
    assert slow.films == 1 and "process_completed" not in client.said(event)  # it is in the same step
    slow.go.set()
    assert "Stopped" in json.dumps(client.wait(event))


def test_a_page_whose_loading_is_answered_late_keeps_its_film(client, picture):
    event = generate(client, picture)
    client.wait_for(event, "step 1 of 2")
    client.wait(client.load())
    client.wait(client.start("stop"))
    assert "Stopped" in json.dumps(client.wait(event)), "the film that was begun meanwhile can be stopped"
    client.wait(client.load())
    assert client.wait(client.start("more", extra=1))["success"], "and continued"


def test_stop_then_generate_makes_one_film_at_a_time(client, picture, slow, films):
    event = generate(client, picture)
    client.wait_for(event, "step 1 of 2")
    client.wait(client.start("stop"))
    client.wait(event)
    again = generate(client, picture)
    client.wait_for(again, "step 1 of 2")
    client.wait(client.start("stop"))
    client.wait(again)
    assert slow.most == 1 and slow.films == 0


def test_who_waits_sees_the_place(client, address, picture, slow):
    slow.go.clear()
    event = generate(client, picture)
    client.wait_for(event, "step 1 of 2")
    other = PageClient(address)
    waiting = generate(other, picture)
    other.wait_for(waiting, "1 film is made first")
    other.wait(other.start("stop"))
    assert "There is no film yet" in json.dumps(other.wait(waiting)) and slow.films == 1
    client.wait(client.start("stop"))
    slow.go.set()
    client.wait(event)


def test_rounds_of_submit_and_cancel_leave_nothing_behind(serve_models, world, films, picture):
    from gradio_client import Client, handle_file

    step = 0.15
    slow = Slow(world, step)
    address = serve_models(slow.world, films)
    clients = [Client(address, verbose=False) for _ in range(4)]
    me = psutil.Process()

    def one_round(number: int) -> None:
        jobs = [client.submit(handle_file(picture), "", 161, number, "", api_name="/film") for client in clients]
        time.sleep(step * (1 + number % 3))
        for job in jobs:
            job.cancel()

    one_round(0)
    until(lambda: slow.films == 0)
    time.sleep(2 * step)
    threads, files, children = own_threads(), me.num_fds(), len(me.children(recursive=True))
    folders = set(films.iterdir())
    for number in range(20):
        one_round(number)
    until(lambda: slow.films == 0)
    path = clients[0].predict(handle_file(picture), "", 81, 0, "", api_name="/film")  # it still works
    assert len(read_mp4(path)) == 81
    assert slow.most == 1
    assert len(me.children(recursive=True)) <= children
    assert own_threads() == threads and me.num_fds() <= files + 24  # the clients keep some connections open
    assert all((folder / "session.safetensors").exists() for folder in set(films.iterdir()) - folders)
    for client in clients:
        client.close()


def test_too_little_memory_is_said_to_programs_and_the_next_film_is_made(serve_models, world, films, picture):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    full = copy.copy(world)

    def iterate_chunk(session):
        if session.settings.prompt == "large":
            raise NotEnoughMemory("there is too little GPU memory for a chunk")
        yield from world.iterate_chunk(session)

    full.iterate_chunk = iterate_chunk
    client = Client(serve_models(full, films), verbose=False)
    with pytest.raises(AppError, match="There is too little GPU memory"):
        client.predict(handle_file(picture), "", 81, 0, "large", api_name="/film")
    assert len(read_mp4(client.predict(handle_file(picture), "", 81, 0, "", api_name="/film"))) == 81


def test_a_null_prompt_is_named(client, picture):
    body = {"data": [client.upload(picture), "", 81, 0, None, "", ""]}
    number = client.http.post(client.address + "call/film", json=body).json()["event_id"]
    answer = client.http.get(client.address + f"call/film/{number}").text
    assert "event: error" in answer and "prompt must be text" in answer.lower()


def test_films_are_made_after_their_folder_was_cleaned_away(serve_models, world, films, picture):
    from gradio_client import Client, handle_file

    client = Client(serve_models(world, films), verbose=False)
    films.rmdir()
    assert len(read_mp4(client.predict(handle_file(picture), "", 81, 0, "", api_name="/film"))) == 81


# ------------------------------------------------------------------------------------------------------- hasty persons


@pytest.fixture
def quick(serve, films) -> str:
    return serve(films)


def test_one_page_makes_one_film_at_a_time(client, picture, slow, films):
    image = client.upload(picture)
    events = [client.start("generate", picture=image) for _ in range(5)]
    until(lambda: sum("process_completed" in client.said(event) for event in events) == 4)
    refused = [event for event in events if "process_completed" in client.said(event)]
    assert all("in the making already" in client.said(event) for event in refused)
    (event,) = set(events) - set(refused)
    client.wait_for(event, "step 1 of 2")
    assert len(list(films.iterdir())) == 1
    client.wait(client.start("stop"))
    assert "Stopped" in json.dumps(client.wait(event))


def test_stop_while_a_new_film_waits_gives_the_last_one_back(serve_models, world, films, picture):
    slow = Slow(world, 0.0)
    address = serve_models(slow.world, films)
    client, other = PageClient(address), PageClient(address)
    event = generate(client, picture, frames=81)
    assert client.wait(event)["success"]
    (film,) = films.iterdir()
    slow.go.clear()
    blocker = generate(other, picture)
    other.wait_for(blocker, "step 1 of 2")
    event = generate(client, picture)
    client.wait_for(event, "1 film is made first")
    client.wait(client.start("stop"))
    last = json.dumps(client.wait(event))
    assert "Stopped" in last and "81 frames" in client.said(event) and film.name in client.said(event)
    assert len(list(films.iterdir())) == 2
    other.wait(other.start("stop"))
    slow.go.set()
    other.wait(blocker)
    event = client.start("more", extra=1)  # the film is the page's again
    assert client.wait(event)["success"] and "161 frames" in client.said(event)


def test_one_program_cannot_fill_the_queue_and_cheap_events_are_never_refused(client, address, picture, slow):
    from gradio_client import Client, handle_file

    slow.go.clear()

    greedy = Client(address, verbose=False)
    jobs = [greedy.submit(handle_file(picture), "", 4001, 0, "", api_name="/film") for _ in range(80)]
    until(lambda: sum(job.done() for job in jobs) == 72)
    assert all("8 films in the making already" in str(job.exception()) for job in jobs if job.done())
    assert client.wait(client.start("picture", "change", picture=client.upload(picture)))["success"]
    event = generate(client, picture)
    client.wait_for(event, "8 films are made first")
    client.wait(client.start("stop"))
    assert client.wait(event)["success"]
    for job in jobs:
        job.cancel()


def test_of_many_pages_at_once_each_gets_its_own_downloads(quick, picture, films):
    clients = [PageClient(quick) for _ in range(20)]
    image = clients[0].upload(picture)
    events = [client.start("generate", picture=image, frames=81) for client in clients]
    found = set()
    for client, event in zip(clients, events, strict=True):
        assert client.wait(event, 300)["success"]
        assert "Done" in client.said(event) and "Download" in client.said(event)
        found |= {film.name for film in films.iterdir() if film.name in client.said(event)}
    assert len(found) == 20 == len(list(films.iterdir()))
