"""What a server keeps on the disk, for how long, and whose it is."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from page_client import PageClient
from servers import free_port

from infworld.app import server
from infworld.app.environment import uploads_folder
from infworld.app.films import FilmStore
from infworld.app.folders import folder_size, make_private, own_folder
from infworld.app.sweeper import Sweeper, forget_closed_pages

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX")


def until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_old(folder: Path, seconds: float) -> None:
    for path in (folder, *folder.rglob("*")):
        os.utime(path, (time.time() - seconds,) * 2, follow_symlinks=False)


# --------------------------------------------------------------------------------------------------------------- whose


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    """A temporary folder that all users of the machine share."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def is_private(folder: Path) -> bool:
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o700 and found.st_uid == os.getuid()


@posix
def test_the_folder_is_this_users_alone_and_the_same_at_every_start(shared):
    folder = own_folder("films")
    assert is_private(folder) and own_folder("films") == folder and folder.parent == shared
    folder.chmod(0o755)
    assert is_private(own_folder("films"))


@posix
def test_a_planted_link_is_not_followed(shared, tmp_path):
    target = tmp_path / "private"
    target.mkdir()
    (target / "secret.txt").write_text("secret")
    planted = own_folder("films")
    planted.rmdir()
    planted.symlink_to(target)
    folder = own_folder("films")
    assert folder != planted and is_private(folder) and folder.resolve() == folder
    with pytest.raises(PermissionError, match="link"):
        FilmStore(planted, 60, 30)
    with pytest.raises(PermissionError, match="link"):
        make_private(planted)


@posix
@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be somebody else")
def test_two_users_of_one_machine_have_a_folder_each(shared):
    mine = own_folder("films")
    for parent in shared.parents:  # pytest's own are closed to others
        if Path("/tmp") in parent.parents:
            parent.chmod(parent.stat().st_mode | 0o011)
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setuid(12345)
        os.write(writer, str(own_folder("films")).encode())
        os._exit(0)
    os.wait()
    theirs = Path(os.read(reader, 1000).decode())
    assert theirs != mine and theirs.parent == shared and theirs.stat().st_uid == 12345
    os.chown(mine, 12345, -1)  # somebody was there before
    assert own_folder("films") not in (mine, theirs)


@posix
def test_films_of_a_server_are_for_its_user_alone(serve, picture, tmp_path):
    films = tmp_path / "films"
    films.mkdir(mode=0o755)
    client = PageClient(serve(films))
    client.wait(client.start("generate", picture=client.upload(picture)))
    assert is_private(films) and all(is_private(film) for film in films.iterdir()) and list(films.iterdir())


def ask(client: PageClient, image) -> str:
    data = [image, "", 81, 0, "", "", ""]
    number = client.http.post(client.address + "call/film", json={"data": data}).json()["event_id"]
    return client.http.get(client.address + f"call/film/{number}").text


@posix
def test_a_link_in_place_of_the_folder_that_was_cleaned_away_is_refused(serve, picture, tmp_path):
    films, target = tmp_path / "films", tmp_path / "target"
    client = PageClient(serve(films))
    image = client.upload(picture)
    films.rmdir()
    assert "event: complete" in ask(client, image)  # made again
    for film in films.iterdir():
        for path in sorted(film.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        film.rmdir()
    films.rmdir()
    target.mkdir()
    films.symlink_to(target)
    assert "is a link" in ask(client, image) and not list(target.iterdir())
    films.unlink()
    assert "event: complete" in ask(client, image)


# ------------------------------------------------------------------------------------------------------------ how long


def test_a_film_that_waits_or_is_made_is_not_swept(serve_models, world, picture, tmp_path, monkeypatch):
    import copy

    monkeypatch.setattr(server, "LIFETIME", 1.0)
    slow, go = copy.copy(world), threading.Event()

    def iterate_chunk(session):
        for result in world.iterate_chunk(session):
            if session.settings.prompt == "wait":
                assert go.wait(60)
            yield result

    slow.iterate_chunk = iterate_chunk
    films = tmp_path / "films"
    address = serve_models(slow, films)
    first, second = PageClient(address), PageClient(address)
    event = first.start("generate", picture=first.upload(picture), frames=81)
    assert first.wait(event)["success"]
    (film,) = films.iterdir()
    blocker = second.start("generate", picture=second.upload(picture), frames=81, prompt="wait")
    until(lambda: len(list(films.iterdir())) == 2)
    event = first.start("more", extra=1)
    first.wait_for(event, "1 film is made first")
    time.sleep(2.5)
    assert film.exists()
    go.set()
    message = first.wait(event)
    assert message["success"] and "161 frames" in first.said(event)
    second.wait(blocker)
    until(lambda: not list(films.iterdir()))


def test_uploads_are_swept_by_age_whoever_left_them(tmp_path, caplog):
    uploads = tmp_path / "uploads"
    forgotten = []
    sweeper = Sweeper(FilmStore(tmp_path / "films", 60, 30), uploads, 60, swept=lambda *found: forgotten.append(found))
    for name in ("old", "new"):
        (uploads / name).mkdir(parents=True)
        (uploads / name / "a.png").write_bytes(b"a")
    make_old(uploads / "old", 61)
    sweeper.sweep()
    assert not (uploads / "old").exists() and (uploads / "new" / "a.png").exists()
    assert forgotten == [({str(uploads / "old" / "a.png")}, 1)]


def test_an_error_of_the_sweeper_is_logged_and_the_next_sweep_goes_on(tmp_path, caplog, monkeypatch):
    store = FilmStore(tmp_path / "films", 60, 30)
    sweeper = Sweeper(store, tmp_path / "uploads", 60)
    with monkeypatch.context() as patch:
        patch.setattr(store, "sweep", lambda in_use: 1 / 0)
        (tmp_path / "uploads").mkdir()
        (tmp_path / "uploads" / "a.png").write_bytes(b"a")
        make_old(tmp_path / "uploads", 61)
        sweeper.sweep()
    assert "sweeping failed" in caplog.text and not (tmp_path / "uploads" / "a.png").exists()


def test_a_sweep_without_file_descriptors_is_said_in_a_line(tmp_path, caplog, monkeypatch):
    """It goes on as long as they are lacking."""
    store = FilmStore(tmp_path / "films", 60, 30)

    def sweep(in_use):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(store.root))

    monkeypatch.setattr(store, "sweep", sweep)
    Sweeper(store, tmp_path / "uploads", 60).sweep()
    assert "sweeping failed: [Errno 24] Too many open files" in caplog.text and "Traceback" not in caplog.text


def test_a_page_that_is_closed_leaves_no_thread(world, tmp_path):
    before = set(threading.enumerate())
    where = {"server_name": "127.0.0.1", "server_port": free_port()}
    page = server.serve(world, tmp_path / "films", prevent_thread_lock=True, quiet=True, **where)

    def working() -> list[str]:
        return sorted(thread.name for thread in set(threading.enumerate()) - before)

    assert {"runner 0", "sweeper"} <= set(working())
    page.close(verbose=False)
    until(lambda: not {"runner 0", "sweeper"} & set(working()), 20)


def test_without_file_descriptors_uploads_do_not_count_as_none(tmp_path, monkeypatch):
    """Else the limits of uploads would be those of an empty disk until the next sweep."""
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "a.png").write_bytes(b"123")
    counted: list[int] = []
    sweeper = Sweeper(
        FilmStore(tmp_path / "films", 60, 30), tmp_path / "uploads", 60, swept=lambda _, n: counted.append(n)
    )
    sweeper.sweep()
    assert counted == [3]
    list_folder = os.scandir

    def scandir(path):
        if str(path).endswith("uploads"):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    sweeper.sweep()
    assert counted == [3]
    assert folder_size(tmp_path / "gone") == 0


def test_uploads_that_keep_arriving_do_not_end_the_sweeping(serve, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(server, "UPLOADS_LIFETIME", 1.0)
    client = PageClient(serve(tmp_path / "films"))
    stop, paths = threading.Event(), []

    def upload() -> None:
        while not stop.is_set():
            paths.append(Path(client.upload(picture)["path"]))
            picture_bytes = picture.read_bytes()
            other = tmp_path / f"{len(paths)}.png"
            other.write_bytes(picture_bytes + str(len(paths)).encode())
            paths.append(Path(client.upload(other)["path"]))

    uploader = threading.Thread(target=upload)
    uploader.start()
    time.sleep(2.5)
    stop.set()
    uploader.join()
    assert len({*paths}) > 10
    until(lambda: not any(path.exists() for path in paths))


def test_an_upload_in_use_is_kept(serve, picture, tmp_path):
    client = PageClient(serve(tmp_path / "films"))
    image = client.upload(picture)
    make_old(Path(image["path"]).parent, server.UPLOADS_LIFETIME / 2)  # no sweep takes it yet
    client.wait(client.start("picture", "change", picture=image))
    assert time.time() - Path(image["path"]).stat().st_mtime < 60


def test_closed_pages_are_forgotten_and_open_ones_are_not(serve, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LIFETIME", 5.0)  # swept every half a second
    kept = []
    monkeypatch.setattr(server, "forget_closed_pages", lambda pages, _: kept.append(pages))
    address = serve(tmp_path / "films")
    closed, opened = PageClient(address), PageClient(address)
    heartbeat = "{0.address}heartbeat/{0.session}".format
    with opened.http.stream("GET", heartbeat(opened)):
        with closed.http.stream("GET", heartbeat(closed)):
            for client in (closed, opened):
                client.wait(client.start("frames", "change", frames=161))
        until(lambda: any(opened.session in pages.session_data for pages in kept))  # other servers sweep as well
        pages = next(pages for pages in kept if opened.session in pages.session_data)
        until(lambda: pages.session_data[closed.session].is_closed)
        forget_closed_pages(pages, 60)
        assert {closed.session, opened.session} <= {*pages.session_data}
        forget_closed_pages(pages, 0)
        assert opened.session in pages.session_data and closed.session not in pages.session_data
    assert client.wait(client.start("frames", "change", frames=81))["success"]


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def running():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.kill()
    process.wait()


def test_what_a_killed_server_left_of_a_film_is_swept(tmp_path, ended, running):
    store = FilmStore(tmp_path / "films", 3600, 30)
    film = store.new()
    (film.folder / "pieces").mkdir(parents=True)
    for name in (
        *(f".next.safetensors.1a2b3c4d.{ended}.part", f"pieces/.001-80-ab.mp4.1a2b3c4d.{ended}.part.mp4"),
        *(f".next.safetensors.1a2b3c4d.{running}.part", "session.safetensors"),
    ):
        (film.folder / name).write_bytes(b"a")
    kept = {"session.safetensors", f".next.safetensors.1a2b3c4d.{running}.part"}
    store.sweep()
    assert {path.name for path in film.folder.rglob("*") if path.is_file()} == kept
    make_old(film.folder, 3000)  # from before that process, which has its number from one that was killed
    store.sweep()
    assert {path.name for path in film.folder.rglob("*") if path.is_file()} == {"session.safetensors"}


def test_uploads_of_processes_that_have_ended_are_removed_at_the_next_start(tmp_path, monkeypatch, ended, running):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    folder = uploads_folder()
    for number in (ended, running):
        (folder.parent / f"process-{number}" / "abc").mkdir(parents=True)
        (folder.parent / f"process-{number}" / "abc" / "a.png").write_bytes(b"a")
    (folder / "b.png").write_bytes(b"a")  # of one with this process's number
    (tmp_path / "somebody else's.png").write_bytes(b"a")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(folder))  # as a child's own has it
    assert uploads_folder() == folder and list(folder.iterdir()) == []
    names = {folder.name, f"process-{running}"}
    assert {path.name for path in folder.parent.iterdir()} == names
    assert (tmp_path / "somebody else's.png").exists()


def test_the_page_starts_where_somebody_else_has_the_names(shared, picture, serve_models, world):
    """With Gradio's own name for uploads too, which a second user could not write to."""
    taken = own_folder("films")
    taken.rmdir()
    taken.write_text("not a folder")
    client = PageClient(serve_models(world, None))
    assert "event: complete" in ask(client, client.upload(picture))
    assert taken.read_text() == "not a folder"
