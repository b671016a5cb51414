"""Many films from one file: all are checked before the first is made, wrong ones are named, the others are made."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from infworld.cli import generate
from infworld.cli.film import FilmPlan
from infworld.cli.jobs import finished
from infworld.session import Session
from infworld.video import read_mp4


@pytest.fixture
def make(monkeypatch, small_model, tmp_path, world):
    """Runs the program on the text of a jobs file: make(text) -> exit code."""
    monkeypatch.setattr(generate.infworld, "load", lambda name, device, **_: world)
    monkeypatch.chdir(tmp_path)

    def run(text: str | bytes, *arguments: str) -> int:
        (tmp_path / "jobs").write_bytes(text if isinstance(text, bytes) else text.encode())
        return generate.main(["--jobs", "jobs", "--model", str(small_model), "--frames", "81", *arguments])

    return run


@pytest.fixture
def job(picture):
    """One entry as JSON: job(out, **options)."""
    return lambda out, **options: json.dumps({"image": str(picture), "out": out, **options}, ensure_ascii=False)


def films():
    return sorted(name for name in os.listdir() if name.endswith(".mp4"))


@pytest.mark.parametrize(
    "written",
    [
        lambda lines: "".join(f"{line}\n" for line in lines) + "\n",
        lambda lines: "\r\n".join(lines) + "\r\n\r\n",
        lambda lines: b"\xef\xbb\xbf" + "\n".join(lines).encode(),
        lambda lines: b"\xef\xbb\xbf" + f"[{','.join(lines)}]".encode(),
        lambda lines: f"[{','.join(lines)}]".encode("utf-16"),
    ],
    ids=["blank last line", "Windows lines", "lines with a mark", "list with a mark", "UTF-16"],
)
def test_every_way_to_write_the_list_is_read(make, job, written):
    prompt = "a field\u2028at dusk\x85"
    assert make(written([job("a.mp4", prompt=prompt, session="a.safetensors"), job("b.mp4", seed=None)])) == 0
    assert films() == ["a.mp4", "b.mp4"] and Session.load("a.safetensors").settings.prompt == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": 5}, "prompt must be text, not 5"),
        ({"frames": "81"}, "whole number, not '81'"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 2.5}, "seed must be a whole number"),
        ({"steps": "9"}, "steps must be a whole number"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
        ({"preset": ["fast"]}, "unknown preset"),
        ({"actions": 7}, "actions must be a list"),
        ({"actions": {"a": 1}}, "actions must be a list"),
        ({"session": 0}, "session must be a path in quotes, not 0"),
        ({"image": "gone.png"}, "no picture at gone.png"),
        ({"image": ["a.png"]}, "image must be a path in quotes"),
        ({"out": 3}, "out must be a path in quotes, not 3"),
        ({"out": "no/folder.mp4"}, "there is no folder"),
        ({"out": "\0.mp4"}, "must be a .mp4 file"),
        ({"fps": 3}, "must be an object with actions"),
    ],
)
def test_a_wrong_job_is_named_by_its_line_and_the_others_are_made(make, job, capsys, options, message):
    assert (
        make(
            "\n".join(
                [job("a.mp4"), "", job("b.mp4") if not options else job(**{"out": "b.mp4", **options}), job("c.mp4")]
            )
        )
        == 2
    )
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "jobs, line 3: job 2" in error and message in error
    assert films() == ["a.mp4", "c.mp4"]


def test_a_line_that_is_not_json_is_named_and_the_others_are_made(make, job, capsys):
    assert make("\n".join([job("a.mp4"), job("b.mp4")[:-5], job("c.mp4")])) == 2
    assert "jobs, line 2: job 2 is not JSON" in capsys.readouterr().err and films() == ["a.mp4", "c.mp4"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"out": "x.mp4"}, {"out": "x.mp4", "frames": 161}),
        ({"out": "x.mp4"}, {"out": "./folder/../x.mp4"}),
        ({"out": "x.mp4"}, {"out": "link/x.mp4"}),
        ({"out": "x.mp4", "session": "s.safetensors"}, {"out": "y.mp4", "session": "link/s.safetensors"}),
        ({"out": "x.mp4"}, {"out": "y.mp4", "session": "x.session.safetensors"}),
    ],
)
def test_two_films_in_one_file_are_refused_before_the_first_is_made(make, job, capsys, first, second):
    os.mkdir("folder")
    os.symlink(".", "link")
    assert make("\n".join([job(**first), job("other.mp4"), job(**second)])) == 2
    said = capsys.readouterr().err
    assert "line 1: job 1" in said and "line 3: job 3" in said and "would all write" in said
    assert said.index("would all write") < said.index("chunk 1/") and films() == ["other.mp4"]


def test_the_same_command_goes_on_with_the_films_that_are_left(make, job, capsys, monkeypatch):
    jobs = [job(f"{name}.mp4", seed=seed, actions="right 80") for seed, name in enumerate("abc")]
    assert make("\n".join(jobs)) == 0
    said = capsys.readouterr().out
    assert "film 1 of 3\n" in said and re.search(r"film 3 of 3, \d\d:\d\d left\n", said)
    before, lost = {name: os.stat(name).st_mtime_ns for name in films()}, read_mp4("b.mp4")
    os.remove("b.mp4")
    assert make("\n".join(jobs)) == 0
    said = capsys.readouterr().out
    assert "2 films are there already and stay" in said and "film 1 of 1\n" in said
    np.testing.assert_array_equal(read_mp4("b.mp4"), lost)
    assert [os.stat(name).st_mtime_ns == then for name, then in before.items()] == [True, False, True]
    monkeypatch.setattr(generate.infworld, "load", None)  # when nothing is left, no model is loaded
    assert make("\n".join(jobs)) == 0


def test_a_film_with_too_few_frames_is_not_finished(small_model, picture, tmp_path, world, monkeypatch):
    monkeypatch.setattr(generate.infworld, "load", lambda *_, **__: world)
    arguments = ["--image", str(picture), "--model", str(small_model), "--out", str(tmp_path / "film.mp4")]
    assert generate.main([*arguments, "--frames", "81"]) == 0
    assert finished(FilmPlan.of(generate.parse([*arguments, "--frames", "81"])))
    assert not finished(FilmPlan.of(generate.parse([*arguments, "--frames", "161"])))
    assert not finished(FilmPlan.of(generate.parse([*arguments[:-1], str(tmp_path / "other.mp4")])))


def test_when_no_job_can_be_made_no_model_is_loaded(make, job, capsys, monkeypatch):
    monkeypatch.setattr(generate.infworld, "load", lambda *_, **__: pytest.fail("loaded"))
    assert make(job("x.mp4", image="gone.png")) == 2
    assert make("\n") == 2 and "lists no films" in capsys.readouterr().err


@pytest.mark.parametrize("text", [b"\xff\xff\xff", b"[" * 100_000, b"[" + b"9" * 5000 + b"]"])
def test_what_cannot_be_read_is_one_error(make, capsys, text):
    assert make(text) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="torchrun's signals are POSIX")
def test_a_process_whose_films_are_done_or_wrong_does_not_end_the_others(job, small_model, tmp_path):
    """torchrun ends all processes when one fails; the first one has a wrong job, and is done much earlier."""
    out = str(tmp_path / "long.mp4")
    jobs = [job(str(tmp_path / "a.mp4")), job(out, frames=321), job(str(tmp_path / "b.mp4"), image="gone.png")]
    (tmp_path / "jobs").write_text("\n".join(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "infworld", "generate", "--jobs", tmp_path / "jobs", "--frames", "81"]
    done = subprocess.run([*command, "--model", small_model], capture_output=True, text=True, timeout=400)
    assert done.returncode == 1 and "line 3: job 3" in done.stderr, done.stderr  # torchrun's own code for a failure
    assert len(read_mp4(out)) == 321 and len(read_mp4(tmp_path / "a.mp4")) == 81


def test_each_film_has_chunks_of_its_own_length(make, job, tmp_path):
    entries = [job("a.mp4", frames=33, chunk_frames=16, session="a.safetensors"), job("b.mp4", session="b.safetensors")]
    assert make("\n".join(entries)) == 0
    lengths = [[c.shape[2] for c in Session.load(tmp_path / f"{name}.safetensors").chunk_latents] for name in "ab"]
    assert lengths == [[5, 5], [21]]


@pytest.mark.parametrize("length", ["16", 15, 16.0, True])
def test_a_length_of_chunks_that_cannot_be_is_named(make, job, capsys, length):
    assert make(job("a.mp4", chunk_frames=length)) == 2
    assert f"steps of 4, not {length!r}" in capsys.readouterr().err
