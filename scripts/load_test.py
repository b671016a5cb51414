"""Many requests at once, some of them from clients that vanish in the middle: does the page's server stand it?

python scripts/load_test.py                              random weights, a few minutes
python scripts/load_test.py --model tiny --lifetime 900  the shipped model, about half an hour

Starts a server of its own on this machine, asks it through gradio_client, prints a table, and exits with 1 if anything
in it is not as it should be. Needs what the tests need. Not part of the tests, as it takes minutes.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event, Semaphore
from pathlib import Path

import httpx
import numpy as np
import psutil
from gradio_client import Client, handle_file
from gradio_client.client import Job
from gradio_client.utils import Status
from imageio_ffmpeg import count_frames_and_secs
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MOST_REQUESTS = 64  # what the server's queue holds (runner.MAX_WAITING, not imported: clients have to start fast)
WARM_UP = 8  # requests at once before memory is first measured
VANISHING = 0.3  # share of the requests whose client vanishes
GROUP = 3  # requests of one client that vanishes
ASKED_AGAIN = 5  # films that are asked for once more, alone, after the load
PAGE_SECONDS = 3.0  # a page load may take, under load too
MEMORY_GROWTH = 0.15  # of the memory after the warm-up: what may have been added in the end
CLIENT = {"verbose": False, "analytics_enabled": False, "httpx_kwargs": {"timeout": 60}}
PATIENCE = 2400  # seconds that any wait of this script may last


@dataclass(frozen=True)
class Wish:
    """What one request asks for; `number` makes it another film than all others."""

    number: int

    @property
    def frames(self) -> int:
        return (81, 161)[self.number % 2]

    def submit(self, client: Client, picture: Path) -> Job:
        actions = ("forward 80, right 80", "left 40, right 40", "forward+left 60")[self.number % 3]
        return client.submit(handle_file(picture), actions, self.frames, self.number, "", api_name="/film")


@dataclass
class Load:
    """What was seen while the requests were answered."""

    results: list[Path | Exception] = field(default_factory=list)
    seconds: float = 0.0
    slowest_page: float = 0.0  # seconds
    peak: int = 0  # bytes
    films: set[str] = field(default_factory=set)  # names of folders

    @property
    def answered(self) -> int:
        return sum(isinstance(result, Path) for result in self.results)


@dataclass(frozen=True)
class Line:
    """One line of the table. passed: None where a figure is only told."""

    name: str
    value: str
    limit: str = ""
    passed: bool | None = None


class Server:
    """The page's server in a process of its own, with all its files below `folder`."""

    def __init__(self, model: str, folder: Path, lifetime: float):
        self.films, self.temp = folder / "films", folder / "temp"
        self.temp.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}/"
        arguments = (model, self.films, self.temp, lifetime, port)
        self.process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments)

    def __enter__(self) -> Server:
        self.process.start()
        if not wait_until(lambda: self._answers() or not self.process.is_alive(), 120) or not self.process.is_alive():
            raise RuntimeError("the server did not start")
        return self

    def __exit__(self, *exception) -> None:
        self.process.terminate()
        self.process.join(20)
        self.process.kill()

    def _answers(self) -> bool:
        try:
            return httpx.get(self.address).is_success
        except httpx.TransportError:
            return False

    def page_seconds(self) -> float:
        began = time.monotonic()
        httpx.get(self.address, timeout=60).raise_for_status()
        return time.monotonic() - began

    def memory(self) -> int:
        """Resident bytes."""
        return psutil.Process(self.process.pid).memory_info().rss

    def film_names(self) -> set[str]:
        return {folder.name for folder in self.films.glob("film-*")}

    def files(self) -> list[Path]:
        """What lies in the folders of films, uploads and temporary files, but for empty folders of the latter two."""
        return [*self.films.glob("*"), *(path for path in self.temp.rglob("*") if path.is_file())]

    def ffmpegs(self) -> int:
        """Processes that write below this server's folder, or are its children."""
        children = set(psutil.Process(self.process.pid).children(recursive=True)) if self.process.is_alive() else set()
        return sum(
            "ffmpeg" in process.info["name"]
            and (process in children or any(str(self.films) in word for word in process.info["cmdline"] or ()))
            for process in psutil.process_iter(["name", "cmdline"])
        )


def serve(model: str, films: Path, temp: Path, lifetime: float, port: int) -> None:
    """In the server's process: the page as `app.py` starts it, but films and uploads live short."""
    os.environ |= {"TMPDIR": str(temp), "GRADIO_TEMP_DIR": str(temp), "GRADIO_ANALYTICS_ENABLED": "False"}
    sys.path.insert(0, str(ROOT))
    import infworld
    from infworld.app import server

    server.LIFETIME = server.UPLOADS_LIFETIME = lifetime
    server.serve(infworld.load(model, "cpu"), films, server_name="127.0.0.1", server_port=port, quiet=True)


def vanish(address: str, picture: Path, settings: list[Wish], connected: Semaphore, go: Event) -> None:
    """In a process of its own: asks for films, and is gone when the first one begins to be made."""
    client = Client(address, **CLIENT)
    connected.release()
    go.wait(PATIENCE)
    jobs = [wish.submit(client, picture) for wish in settings]
    wait_until(lambda: any(job.done() or job.status().code is Status.PROCESSING for job in jobs), PATIENCE)
    os._exit(0)  # says goodbye to nobody


def wait_until(condition, seconds: float, pause: float = 0.1) -> bool:
    """Whether the condition has come true in that time."""
    deadline = time.monotonic() + seconds
    while not (there := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return bool(there)


def connect(server: Server, downloads: Path, number: int) -> list[Client]:
    """That many clients, each a session of its own."""

    def client(_) -> Client:
        return Client(server.address, download_files=downloads, **CLIENT)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(client, range(number)))


def result(job: Job) -> Path | Exception:
    try:
        return Path(job.result(timeout=PATIENCE))
    except Exception as error:  # of any kind: it is told in the table
        return error


def fire(server: Server, clients: list[Client], groups: list[list[Wish]], settings: list[Wish], picture: Path) -> Load:
    """One wish for each client, mixed with the groups of settings of clients that vanish."""
    context = multiprocessing.get_context("spawn")
    go, connected = [context.Event() for _ in groups], context.Semaphore(0)
    vanishing = [
        context.Process(target=vanish, args=(server.address, picture, group, connected, event), daemon=True)
        for group, event in zip(groups, go, strict=True)
    ]
    for process in vanishing:
        process.start()
    for _ in vanishing:
        connected.acquire(timeout=60)
    load, began, jobs = Load(), time.monotonic(), []
    for place, (client, wish) in enumerate(zip(clients, settings, strict=True)):
        for event in go[place * len(go) // len(clients) : (place + 1) * len(go) // len(clients)]:
            event.set()
        jobs.append(wish.submit(client, picture))

    def over() -> bool:
        load.slowest_page = max(load.slowest_page, server.page_seconds())
        load.peak = max(load.peak, server.memory())
        load.films |= server.film_names()
        return all(job.done() for job in jobs) and not any(process.is_alive() for process in vanishing)

    wait_until(over, PATIENCE, pause=0.5)
    load.seconds = time.monotonic() - began
    load.results = [result(job) for job in jobs]
    return load


def test(requests: int, model: str, lifetime: float, folder: Path) -> list[Line]:
    """The whole story; returns the table."""
    picture, downloads = folder / "picture.png", folder / "downloads"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(picture)
    downloads.mkdir()
    groups = max(1, round(requests * VANISHING / GROUP))
    settings = [Wish(number) for number in range(requests)]
    staying, leaving = settings[groups * GROUP :], settings[: groups * GROUP]

    with Server(model, folder, lifetime) as server:
        clients = connect(server, downloads, len(staying))
        for job in [Wish(number).submit(clients[0], picture) for number in range(WARM_UP)]:
            job.result(timeout=PATIENCE)
        warm, before = server.memory(), server.film_names()
        load = fire(server, clients, [leaving[i::groups] for i in range(groups)], staying, picture)
        again = [result(wish.submit(clients[0], picture)) for wish in staying[:ASKED_AGAIN]]
        for client in clients:
            client.close()
        wait_until(
            lambda: not server.files() and not server.ffmpegs(), 1.5 * lifetime + 30, pause=1
        )  # looked for twice a lifetime
        lines = [
            *about_films(load, staying, again),
            Line("films begun for those who vanished", f"{len(load.films - before) - load.answered} of {len(leaving)}"),
            atmost("slowest page load meanwhile", load.slowest_page, PAGE_SECONDS, "s"),
            *about_memory(warm, load.peak, server.memory()),
            atmost("files left after their lifetime", len(server.files()), 0),
            atmost("ffmpeg processes left", server.ffmpegs(), 0),
        ]
    return [*lines, atmost("ffmpeg processes left by a server that ended", server.ffmpegs(), 0)]


def about_films(load: Load, settings: list[Wish], again: list[Path | Exception]) -> list[Line]:
    """Did everybody who stayed get a film, and their own?"""
    films = [(wish, path) for wish, path in zip(settings, load.results, strict=True) if isinstance(path, Path)]
    errors = {str(error) for error in [*load.results, *again] if isinstance(error, Exception)}
    right = sum(count_frames_and_secs(str(path))[0] == wish.frames for wish, path in films)
    same = sum(digest(first) == digest(second) for first, second in zip(load.results, again, strict=False))
    return [
        *(Line("error", error[:80], passed=False) for error in sorted(errors)),
        Line("requests", f"{load.answered} answered in {load.seconds:.0f} s"),
        every("films with exactly the frames asked", right, len(settings)),
        every("films that differ from all others", len({digest(path) for _, path in films}), len(settings)),
        every("same film when asked again, alone", same, len(again)),
    ]


def about_memory(warm: int, peak: int, after: int) -> list[Line]:
    limit = warm * (1 + MEMORY_GROWTH) / 2**20
    return [
        Line("memory after the warm-up", f"{warm / 2**20:.0f} MB"),
        Line("memory at most", f"{peak / 2**20:.0f} MB"),
        atmost("memory in the end", after / 2**20, limit, "MB"),
    ]


def digest(path: Path | Exception) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if isinstance(path, Path) else repr(path)


def every(name: str, value: int, wanted: int) -> Line:
    return Line(name, str(value), f"{wanted}", value == wanted)


def atmost(name: str, value: float, limit: float, unit: str = "") -> Line:
    digits = 1 if unit == "s" else 0
    return Line(name, f"{value:.{digits}f} {unit}".strip(), f"at most {limit:.{digits}f}", value <= limit)


def table(lines: list[Line]) -> str:
    verdicts = {None: "", True: "ok", False: "FAILED"}
    return "\n".join(f"{line.name:46}{line.value:>24}  {line.limit:14}{verdicts[line.passed]}" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fire many requests at the page's server and see what is left.")
    parser.add_argument("--requests", type=int, default=50, help=f"10 to {MOST_REQUESTS}, the queue's length")
    parser.add_argument("--model", help="tiny, or the path of a YAML file; default: a small one of random weights")
    parser.add_argument("--lifetime", type=float, default=120, help="seconds of films; longer than the load lasts")
    args = parser.parse_args()
    if not 10 <= args.requests <= MOST_REQUESTS:
        parser.error(f"--requests must be 10 to {MOST_REQUESTS}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        model = args.model or str(small_model(Path(folder)))
        lines = test(args.requests, model, args.lifetime, Path(folder).resolve())
    print(table(lines))
    return int(any(line.passed is False for line in lines))


def small_model(folder: Path) -> Path:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from conftest import make_small_model

    (folder / "model").mkdir()
    return make_small_model(folder / "model")


if __name__ == "__main__":
    sys.exit(main())
