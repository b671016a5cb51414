"""The command line: a picture and actions become a film; nothing that was made is lost; bad input is said plainly."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from infworld.actions import ActionScript
from infworld.cli import generate
from infworld.cli.film import FilmPlan
from infworld.cli.film_writer import FilmWriter
from infworld.session import Session
from infworld.video import read_mp4
from infworld.world import Chunk


def run(*arguments):
    return generate.main([str(argument) for argument in arguments])


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, world):
    """The model is loaded by the session's fixture; `infworld.load` has its own tests."""
    monkeypatch.setattr(generate.infworld, "load", lambda name, device, **_: world)


@pytest.fixture
def begin(small_model, picture, tmp_path):
    """Arguments of a film of 81 frames at tmp_path/film.mp4."""
    return ["--image", picture, "--model", small_model, "--frames", 81, "--out", tmp_path / "film.mp4"]


def test_a_film_has_the_frames_the_world_makes(begin, tmp_path, world, picture):
    assert run(*begin, "--actions", "forward 40, right 40", "--seed", 7, "--frames", 161) == 0
    film = read_mp4(tmp_path / "film.mp4")
    frames = np.concatenate([c.frames for c in world.rollout(picture, "forward 40, right 40", num_frames=161, seed=7)])
    assert film.shape == frames.shape == (161, 32, 48, 3)
    brightness = [film[..., 1].ravel(), frames[..., 1].ravel()]
    assert np.corrcoef(brightness)[0, 1] > 0.9  # noise is hard on H.264; the wrong frames correlate near 0
    assert os.listdir(tmp_path) == ["film.mp4"]


def test_short_chunks_are_those_that_the_world_makes(begin, tmp_path, world, picture, capsys):
    session = tmp_path / "s.safetensors"
    short = ["--actions", "right 40", "--frames", 33, "--chunk-frames", 16, "--session", session]
    assert run(*begin, *short) == 0
    said = capsys.readouterr().out
    assert "small was trained on chunks of 80 frames: with 16 the picture drifts sooner" in said
    assert f"--resume {session} --frames 65" in said and "--chunk-frames 16" in said
    *_, expected = world.rollout(picture, "right 40", num_frames=33, chunk_frames=16)
    made = Session.load(session)
    assert torch.equal(made.history, expected.session.history)
    assert [latents.shape[2] for latents in made.chunk_latents] == [5, 5]
    assert read_mp4(tmp_path / "film.mp4").shape == (33, 32, 48, 3)


def test_a_film_of_short_chunks_goes_on_with_long_ones(begin, small_model, tmp_path):
    session = tmp_path / "s.safetensors"
    assert run(*begin, "--frames", 17, "--chunk-frames", 16, "--session", session) == 0
    more = ["--model", small_model, "--out", tmp_path / "film.mp4", "--resume", session, "--session", session]
    assert run(*more, "--frames", 97) == 0
    assert [latents.shape[2] for latents in Session.load(session).chunk_latents] == [5, 21]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--chunk-frames", 6], "4 to 80 new frames, in steps of 4, not 6"),
        (["--chunk-frames", 32], "ask for 65 or 97 frames, not 81"),
    ],
)
def test_chunks_that_cannot_be_are_refused(begin, tmp_path, capsys, options, said):
    assert run(*begin, *options) == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_the_length_of_a_film_is_in_whole_chunks_if_nothing_is_said(begin, small_model):
    given = [str(argument) for argument in begin if argument not in ("--frames", 81)]
    assert FilmPlan.of(generate.parse(given)).frames == 161
    assert FilmPlan.of(generate.parse([*given, "--chunk-frames", "48"])).frames == 1 + 4 * 48


def test_a_resumed_film_is_the_film_in_one_go(begin, small_model, tmp_path, capsys):
    script = ActionScript.parse("forward 30, right 100, up 20")
    (tmp_path / "actions.json").write_text(script.to_json())
    common = ["--model", small_model, "--out", tmp_path / "film.mp4"]
    assert (
        run(
            *begin, "--actions", tmp_path / "actions.json", "--frames", 241, "--session", tmp_path / "whole.safetensors"
        )
        == 0
    )
    whole = read_mp4(tmp_path / "film.mp4")
    assert run(*begin, "--actions", tmp_path / "actions.json", "--session", tmp_path / "s.safetensors") == 0
    assert "--resume" in capsys.readouterr().out
    assert (
        run(*common, "--resume", tmp_path / "s.safetensors", "--frames", 241, "--session", tmp_path / "s.safetensors")
        == 0
    )
    assert np.abs(read_mp4(tmp_path / "film.mp4").astype(int) - whole).mean() < 1  # replayed latents are float16
    one, two = Session.load(tmp_path / "whole.safetensors"), Session.load(tmp_path / "s.safetensors")
    assert (one.history == two.history).all() and one.settings.actions == two.settings.actions


def test_a_resumed_film_takes_new_wishes_for_what_comes(begin, small_model, tmp_path):
    path = tmp_path / "s.safetensors"
    assert run(*begin, "--actions", "forward 80", "--session", path) == 0
    settings = ["--actions", "back 80", "--prompt", "night", "--seed", 5, "--steps", 1, "--guidance", 2]
    out = ["--model", small_model, "--out", tmp_path / "film.mp4", "--session", path]
    assert run(*out, "--resume", path, "--frames", 161, *settings) == 0
    session = Session.load(path)
    assert session.settings.actions.text() == "forward 80, back 80"
    assert (session.settings.prompt, session.settings.seed, session.settings.steps, session.settings.guidance) == (
        "night",
        5,
        1,
        2.0,
    )


def test_a_preset_brings_its_steps_unless_they_are_given(begin, small_model, tmp_path):
    out = ["--model", small_model, "--out", tmp_path / "film.mp4", "--session", tmp_path / "s.safetensors"]
    resumed = [*out, "--resume", tmp_path / "s.safetensors", "--frames"]
    found = []
    for command in (
        [*begin, "--preset", "fast", "--steps", 3, *out],
        [*resumed, 161],
        [*resumed, 241, "--preset", "balanced"],
    ):
        assert run(*command) == 0
        session = Session.load(tmp_path / "s.safetensors")
        found.append((session.settings.preset, session.settings.steps))
    assert found == [("fast", 3), ("fast", 3), ("balanced", 2)]  # two steps are the small model's own


def test_what_goes_wrong_while_writing_is_raised_by_the_next_write_or_at_the_end(tmp_path):
    class Full:
        frames = 0

        def write(self, frames):
            raise OSError("the disk is full")

    for end in (lambda writer: writer.write(Chunk(0, None, None, 0, None), new=False), FilmWriter.finish):
        writer = FilmWriter(Full(), tmp_path / "s.safetensors", lambda path, frames: "")
        writer.write(Chunk(0, None, None, 0, None), new=False)
        with pytest.raises(OSError, match="full"):
            end(writer)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_keeps_film_and_session(picture, small_model, tmp_path, world):
    """In a process group of its own, as a terminal has it, interrupted while the second chunk is made."""
    arguments = [
        "--image",
        picture,
        "--model",
        small_model,
        "--frames",
        1281,
        "--out",
        tmp_path / "film.mp4",
        "--steps",
        9,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "infworld", "generate", *map(str, arguments)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    seen = b""
    while b"chunk 3/16" not in seen:
        piece = os.read(process.stderr.fileno(), 4096)
        assert piece, seen.decode()
        seen += piece
    assert b"left" in seen and b"step" in seen
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    session = Session.load(tmp_path / "film.session.safetensors")
    assert len(read_mp4(tmp_path / "film.mp4")) == session.num_frames >= 161
    assert f"stopped: {tmp_path / 'film.mp4'} has {session.num_frames} frames" in out.decode()
    assert world.next_chunk(session).frames.shape == (80, 32, 48, 3)


def test_ctrl_c_before_the_first_frame_leaves_nothing(begin, tmp_path, monkeypatch, world):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.infworld, "load", interrupt)
    assert run(*begin) == 130
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image", "gone.png"], "no picture at"),
        (["--image", __file__], "not a picture"),
        (["--actions", "fly 80"], "unknown action 'fly'"),
        (["--actions", "gone.json"], "no action file"),
        (["--frames", 0], "at least 81 frames"),
        (["--frames", -80], "at least 81 frames"),
        (["--frames", 100], "81 or 161 frames"),
        (["--frames", 80_001], "at most"),
        (["--out", "/proc/film.mp4"], "cannot write"),
        (["--out", "/no/such/folder/film.mp4"], "no folder"),
        (["--out", "film.txt"], "must be a .mp4 file"),
        (["--session", "/proc/s.safetensors"], "cannot write"),
        (["--model", "huge"], "unknown model 'huge'"),
        (["--seed", -1], "seed"),
        (["--steps", 0], "step"),
        (["--guidance", "nan"], "guidance"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(begin, tmp_path, capsys, change, message):
    assert run(*begin, *change) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ('{"move": "no-op"}', "must be a list"),
        ("[3]", "frame 0"),
        ('[{"move": "fly", "view": "no-op"}]', "unknown move 'fly'"),
        ('[{"move": "no-op", "view": 4}]', "unknown view 4"),
        ("[{]", "not valid JSON"),
    ],
)
def test_bad_action_files_are_named(begin, tmp_path, capsys, actions, message):
    (tmp_path / "bad.json").write_text(actions)
    assert run(*begin, "--actions", tmp_path / "bad.json") == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.json"]


def test_a_wrong_session_is_refused(begin, small_model, tmp_path, capsys):
    out = ["--model", small_model, "--out", tmp_path / "film.mp4"]
    assert run(*begin, "--session", tmp_path / "s.safetensors") == 0
    assert run(*out, "--resume", tmp_path / "s.safetensors", "--frames", 81) == 2
    assert "81 frames already" in capsys.readouterr().err
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "s.safetensors").read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text(json.dumps({}))
    for wrong in ("cut", "text", "gone"):
        assert run(*out, "--resume", tmp_path / f"{wrong}.safetensors") == 2
        assert f"{wrong}.safetensors" in capsys.readouterr().err
