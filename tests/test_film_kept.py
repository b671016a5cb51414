"""However the making of a film ends, what was finished is kept, and how to go on is said."""

import errno
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from imageio_ffmpeg import get_ffmpeg_exe

from infworld.cli import film, generate
from infworld.files import claimed
from infworld.session import Session
from infworld.video import read_mp4

POSIX = pytest.mark.skipif(os.name == "nt", reason="signals, descriptors and locks are POSIX")
PATIENCE = 300  # seconds; the machine may be busy
INFWORLD = [sys.executable, "-m", "infworld"]


def run(*arguments):
    return generate.main([str(argument) for argument in arguments])


@pytest.fixture
def loaded(monkeypatch, world):
    """The model is loaded by the session's fixture where the command line runs in this process."""
    monkeypatch.setattr(generate.infworld, "load", lambda name, device, **_: world)


@pytest.fixture
def begin(small_model, picture, tmp_path):
    """Arguments of a film of six chunks at tmp_path/it's a film.mp4."""
    return ["--image", picture, "--model", small_model, "--frames", 481, "--out", tmp_path / "it's a film.mp4"]


@pytest.fixture
def filming(begin, tmp_path):
    """Starts the program for a long film: the process, when it is at its third chunk."""
    processes = []

    def start() -> subprocess.Popen:
        command = [*INFWORLD, "generate", *map(str, begin), "--frames", "1281", "--steps", "9"]
        with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
            processes.append(subprocess.Popen(command, stdout=out, stderr=err))
        deadline = time.monotonic() + PATIENCE
        while finished(tmp_path) < 2:
            assert time.monotonic() < deadline and processes[-1].poll() is None, (tmp_path / "err").read_text()
            time.sleep(0.02)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def finished(folder) -> int:
    """How many chunks the progress bar says are finished."""
    said = re.findall(r"chunk (\d+)/16", (folder / "err").read_text())
    return int(said[-1]) - 1 if said else 0


def go_on(said: str) -> list[str]:
    """The arguments of the command that was said, as a shell reads it."""
    command = re.search(r"go on with: (.*)", said)[1]
    assert shlex.split(command)[:2] == ["infworld", "generate"]
    return shlex.split(command)[2:]


def goes_on(folder, said: str, frames: int) -> None:
    """The command that was said makes the whole film, here of `frames` frames."""
    assert run(*go_on(said), "--frames", frames) == 0
    assert len(read_mp4(folder / "it's a film.mp4")) == frames


# ------------------------------------------------------------------------------------------------------------- signals


@POSIX
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_keeps_film_and_session_also_beside_a_second_run(filming, begin, tmp_path, loaded, capsys, name):
    process = filming()
    assert run(*begin) == 2 and "another run is writing" in capsys.readouterr().err
    number = getattr(signal, name)
    process.send_signal(number)
    assert process.wait(PATIENCE) == 128 + number
    said = (tmp_path / "out").read_text()
    session = Session.load(tmp_path / "it's a film.session.safetensors")
    assert len(read_mp4(tmp_path / "it's a film.mp4")) == session.num_frames == 1 + 80 * finished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["err", "it's a film.mp4", "it's a film.session.safetensors", "out"]
    goes_on(tmp_path, said, session.num_frames + 80)


@POSIX
def test_kill_loses_at_most_the_chunk_in_the_making(filming, small_model, tmp_path, loaded):
    process = filming()
    time.sleep(0.5)
    process.kill()
    process.wait()
    made = finished(tmp_path)  # maybe one more, if its bar was not drawn any more
    path = tmp_path / "it's a film.session.safetensors"
    frames = Session.load(path).num_frames
    assert (frames - 1) // 80 in (made, made + 1)
    deadline = time.monotonic() + PATIENCE
    while sum(playable(part) for part in tmp_path.glob(".it's a film.mp4.*.part.mp4")) < frames - 80:
        assert time.monotonic() < deadline  # ffmpeg outlives the program and ends its piece
        time.sleep(0.1)
    out = ["--out", tmp_path / "it's a film.mp4", "--model", small_model, "--session", path]
    assert run("--resume", path, "--frames", frames + 80, *out) == 0  # it takes over what the killed run has claimed
    assert len(read_mp4(tmp_path / "it's a film.mp4")) == frames + 80
    assert sorted(os.listdir(tmp_path)) == ["err", "it's a film.mp4", "it's a film.session.safetensors", "out"]


def playable(path) -> int:
    try:
        return len(read_mp4(path))
    except ValueError:
        return 0


def test_a_session_of_its_own_is_not_removed_when_the_film_goes_on_from_it(begin, small_model, tmp_path, loaded):
    path = tmp_path / "film.session.safetensors"  # where a run without --session keeps it
    assert run(*begin, "--frames", 81, "--session", path) == 0
    assert run("--model", small_model, "--resume", path, "--frames", 161, "--out", tmp_path / "film.mp4") == 0
    assert Session.load(path).num_frames == 161


# -------------------------------------------------------------------------------------------------------------- errors


class Dying:
    """A world in which something happens before its fourth chunk."""

    def __init__(self, world, happens):
        self._world, self._happens = world, happens

    def __getattr__(self, name):
        return getattr(self._world, name)

    def extend(self, *arguments, **options):
        for chunk in self._world.extend(*arguments, **options):
            if chunk.index == 3:
                self._happens()
            yield chunk


def lose_ffmpeg():
    os.environ["IMAGEIO_FFMPEG_EXE"] = shutil.which("false")


def out_of_memory():
    raise film.NotEnoughMemory("there is too little memory")


def unforeseen():
    raise RuntimeError("nobody thought of this")


@pytest.mark.parametrize(
    ("happens", "kept", "error"),
    [
        (lose_ffmpeg, [321, 401], "ffmpeg ended|ffmpeg could not write"),
        (out_of_memory, [241], "there is too little memory"),
        (unforeseen, [241], "nobody thought of this"),
    ],
)
def test_an_error_keeps_what_was_finished(begin, tmp_path, monkeypatch, capsys, world, happens, kept, error):
    monkeypatch.setattr(generate.infworld, "load", lambda name, device, **_: Dying(world, happens))
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg := get_ffmpeg_exe())
    if happens is unforeseen:  # is not hidden
        with pytest.raises(RuntimeError, match=error):
            run(*begin)
    else:
        assert run(*begin) == 2
    said = capsys.readouterr()
    assert happens is unforeseen or re.search(f"error: .*{error}", said.err)
    frames = Session.load(tmp_path / "it's a film.session.safetensors").num_frames
    assert frames in kept
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", ffmpeg)
    if happens is not lose_ffmpeg:
        assert len(read_mp4(tmp_path / "it's a film.mp4")) == frames
    monkeypatch.setattr(generate.infworld, "load", lambda name, device, **_: world)
    goes_on(tmp_path, said.out, 481)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own: small_disk(bytes) -> folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder]
        if sys.platform != "linux" or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems can only be mounted by root on Linux")
        return folder

    yield mount
    subprocess.run(["umount", folder], capture_output=True)


@pytest.mark.parametrize("size", [60_000, 150_000, 300_000])  # the last one is full when the film is complete
def test_a_full_disk_loses_no_session_on_another(begin, small_disk, tmp_path, capsys, loaded, size):
    disk = small_disk(size)
    assert run(*begin, "--out", disk / "film.mp4", "--session", tmp_path / "s.safetensors") == 2
    said = capsys.readouterr()
    assert "No space left on device" in said.err.splitlines()[-1] and os.listdir(disk) == []
    frames = Session.load(tmp_path / "s.safetensors").num_frames
    assert frames >= 241
    assert run(*go_on(said.out), "--out", tmp_path / "elsewhere.mp4") == 0
    assert len(read_mp4(tmp_path / "elsewhere.mp4")) == 481


def test_a_disk_that_is_full_for_the_session_too_has_it_kept_elsewhere(begin, tmp_path, monkeypatch, capsys, loaded):
    """As on a disk that fills up with the third chunk."""
    elsewhere = tmp_path / "temporary"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    save = Session.save

    def fill(session, path):
        if session.num_frames > 161 and path.parent == tmp_path:
            raise ValueError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")
        save(session, path)

    monkeypatch.setattr(Session, "save", fill)
    assert run(*begin, "--session", tmp_path / "s.safetensors") == 2
    said = capsys.readouterr().out
    arguments = go_on(said)
    assert arguments[0] == "--resume" and os.path.dirname(arguments[1]) == str(elsewhere)
    assert Session.load(arguments[1]).num_frames in (241, 321)
    monkeypatch.setattr(Session, "save", save)
    goes_on(tmp_path, said, 481)


def test_a_film_is_finished_without_the_session_that_nobody_asked_for(begin, tmp_path, monkeypatch, loaded):
    def full(session, path):
        raise ValueError("the disk is full")

    monkeypatch.setattr(Session, "save", full)
    assert run(*begin) == 0
    assert len(read_mp4(tmp_path / "it's a film.mp4")) == 481


# --------------------------------------------------------------------------------------------------------------- saying


@POSIX
@pytest.mark.parametrize(
    "where", ["PYTHONIOENCODING=cp1252 {} >said", "{} 2>&1 | head -0", "{} >&- 2>&- <&-", "{} >/dev/full 2>/dev/full"]
)
def test_saying_what_was_made_never_costs_it(small_model, picture, tmp_path, where):
    if "/dev/full" in where and not os.path.exists("/dev/full"):
        pytest.skip("Linux has /dev/full")
    arguments = ["--image", picture, "--model", small_model, "--frames", 81, "--out", "映画 û.mp4"]
    command = shlex.join([*INFWORLD, "generate", *map(str, arguments), "--session", "続き.safetensors"])
    shell = f"set -o pipefail; {where.format(command)}"
    path = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(["bash", "-c", shell], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0
    assert len(read_mp4(tmp_path / "映画 û.mp4")) == Session.load(tmp_path / "続き.safetensors").num_frames == 81
    if "said" in where:
        assert "\\u6620\\u753b û.mp4 has 81 frames" in (tmp_path / "said").read_text(encoding="cp1252")


# ---------------------------------------------------------------------------------------------------------- file names


@pytest.mark.parametrize("name", ["a: film.mp4", '%03d it\'s "one" $HOME.mp4', f"{'é' * 125}x.mp4"])
def test_any_name_that_is_taken_can_be_written(begin, tmp_path, monkeypatch, capsys, loaded, name):
    monkeypatch.chdir(tmp_path)
    session = f"{'x' * 243}.safetensors"
    assert run(*begin, "--frames", 81, "--out", name, "--session", session) == 0
    arguments = go_on(capsys.readouterr().out)
    assert run(*arguments) == 0
    assert len(read_mp4(name)) == 241 and sorted(os.listdir()) == sorted([name, session])


def test_names_that_begin_with_a_dash_are_said_so_that_they_can_be_given(begin, tmp_path, monkeypatch, capsys, loaded):
    monkeypatch.chdir(tmp_path)
    assert run(*begin, "--frames", 81, "--out=-film.mp4", "--session=-s.safetensors") == 0
    assert run(*go_on(capsys.readouterr().out)) == 0
    assert len(read_mp4("./-film.mp4")) == 241


@pytest.mark.parametrize("option", ["--out", "--session"])
@POSIX
def test_a_second_run_with_the_same_file_is_refused_before_it_computes(begin, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr(generate.infworld, "load", lambda *_, **__: pytest.fail("computed"))
    path = tmp_path / {"--out": "film.mp4", "--session": "s.safetensors"}[option]
    with claimed(path):
        assert run(*begin, option, tmp_path / "." / path.name) == 2
    assert f"another run is writing {path}" in capsys.readouterr().err and os.listdir(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- sessions


def test_a_session_with_all_frames_writes_its_film_again(begin, small_model, tmp_path, capsys, loaded):
    path = tmp_path / "s.safetensors"
    assert run(*begin, "--frames", 161, "--session", path) == 0
    again = ["--model", small_model, "--resume", path, "--out", tmp_path / "again.mp4"]
    assert run(*again, "--frames", 161) == 0
    assert len(read_mp4(tmp_path / "again.mp4")) == 161
    assert run(*again, "--frames", 161) == 2 and run(*again, "--frames", 81) == 2
    assert "161 frames already" in capsys.readouterr().err


def test_the_length_that_is_proposed_is_one_that_the_model_can_make(begin, small_model, monkeypatch):
    """A model of another chunk length, whose films have at most three chunks."""
    args = generate.parse([str(argument) for argument in begin[:4]] + ["--out", "film.mp4"])
    settings = film.load_config(small_model)
    monkeypatch.setattr(type(settings), "chunk_frames", 40)
    longest = settings.max_frames
    assert film.FilmPlan.of(args).frames == 81
    for asked, made, proposed in ((81, 41, 81), (81, 81, 161), (longest, longest, longest)):
        args.frames = asked
        plan = film.FilmPlan.of(args)
        words = shlex.split(plan.next_command(plan.session_path, made))
        assert int(words[words.index("--frames") + 1]) == proposed
        settings.chunks_for(proposed)


def test_a_session_of_shorter_chunks_goes_on_by_whole_ones(small_model, picture, world, tmp_path, capsys, loaded):
    world.next_chunk(world.start(picture), frames=8).session.save(tmp_path / "s.safetensors")
    resume = ["--model", small_model, "--resume", tmp_path / "s.safetensors", "--out", tmp_path / "film.mp4"]
    assert run(*resume, "--frames", 161) == 2 and "ask for 89 or 169, not 161" in capsys.readouterr().err
    assert run(*resume, "--frames", 89) == 0 and len(read_mp4(tmp_path / "film.mp4")) == 89
