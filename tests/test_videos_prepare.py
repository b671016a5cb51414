"""From a folder of films to a folder of clips, through the command: what is made, told, kept and left out."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image

from infworld.cli.prepare_videos import main
from infworld.config import PROJECT_ROOT, load_config
from infworld.files import claimed
from infworld.loading import load_vae
from infworld.training.frames import to_video
from infworld.training.labels import poses_to_matrices
from infworld.training.pictures import SIZES, make_atlas
from infworld.training.stages import framing_stages, render_stages
from infworld.video import write_mp4
from infworld.videos import round_trip
from infworld.videos.dataset import open_data
from infworld.videos.prepare import cropped, split
from infworld.videos.reading import open_film
from tests.test_videos_poses import AHEAD, BACK, LEFT, RIGHT, flat_walk, matrices_of, write_tum


def moving(frames: int, seed: int = 0) -> np.ndarray:
    """Frames of a coarse pattern that moves to the left."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (6, 60, 3), dtype=np.uint8)
    wide = np.kron(coarse, np.ones((16, 16, 1), np.uint8))
    return np.stack([wide[:64, number : number + 96] for number in range(frames)])


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "films").mkdir()
    return tmp_path


def make_film(folder: Path, name: str, frames: int = 100, seed: int = 0) -> np.ndarray:
    """A film, and poses of walking ahead and then turning left in poses/; returns what was done, (2, frames - 1)."""
    path = folder / "films" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    write_mp4(path, moving(frames, seed))
    flat, actions = flat_walk((AHEAD, frames // 2), (LEFT, frames - 1 - frames // 2))
    poses = folder / "poses" / Path(name).with_suffix(".txt")
    poses.parent.mkdir(exist_ok=True, parents=True)
    write_tum(poses, np.arange(frames) / 30, matrices_of(flat))
    return actions


def prepare(folder: Path, model: Path, *more: str) -> int:
    poses = ["--poses", str(folder / "poses")] if (folder / "poses").is_dir() else []
    return main([str(folder / "films"), "--out", str(folder / "data"), "--model", str(model), *poses, *more])


def test_a_film_becomes_a_clip_with_its_actions_and_latents(folder, small_model, capsys):
    actions = make_film(folder, "walk.mp4", 175)
    (folder / "captions.json").write_text(json.dumps({"walk.mp4": "a pattern"}))
    assert prepare(folder, small_model, "--captions", str(folder / "captions.json")) == 0
    assert "1 clips in" in capsys.readouterr().out
    assert logging.getLogger("infworld").level == logging.NOTSET  # others in this process are warned as before
    config = load_config(small_model)
    (clip,) = open_data(folder / "data", config)
    assert (clip.name, clip.size, clip.frames, clip.info.caption) == ("walk.mp4-1", (32, 48), 161, "a pattern")
    assert (clip.info.source, clip.info.start, clip.info.poses, clip.info.pace) == ("walk.mp4", 0.0, "file", 1.0)
    assert clip.uncertain == 0
    assert (clip.actions.numpy() == actions[:, :161]).mean() > 0.97

    # The latents are those of the whole film and of its chunks.
    film = open_film(folder / "films" / "walk.mp4")
    pictures = np.stack([picture for _, picture in zip(range(161), cropped(film, (32, 48), 0.0), strict=False)])
    assert np.array_equal(clip.read("picture").numpy(), pictures[0])
    video, vae = to_video(torch.from_numpy(pictures[None])), load_vae(config, torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        whole, fresh = vae.encode(video)[0], vae.encode(video[:, :, 80:])[0]
    assert torch.allclose(clip.read("history").float().movedim(1, 0)[None], whole, atol=2e-3, rtol=1e-3)
    assert torch.allclose(clip.read("targets", 1, 2)[0].float().movedim(1, 0)[None], fresh, atol=2e-3, rtol=1e-3)
    sample = clip.sample(0, 1)
    assert sample.history.shape == (16, 21, 4, 6) and sample.target.shape == (16, 21, 4, 6)

    page = (folder / "data" / "report.html").read_text()
    assert "walk.mp4" in page and "a pattern" in page and "poses from a file" in page
    assert page.count("data:image/jpeg;base64,") == 1 and "go forward" in page and "turn left" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # it needs nothing beside it


def test_one_film_after_the_other_is_told_and_the_rest_goes_on(folder, small_model, capsys):
    make_film(folder, "a/good.mp4")
    films = folder / "films"
    (films / "text.mp4").write_text("no film")
    write_mp4(films / "three.mp4", moving(3))
    write_mp4(films / "whole.mp4", np.random.default_rng(0).integers(0, 255, (60, 64, 96, 3), dtype=np.uint8))
    (films / "cut-off.mp4").write_bytes((films / "whole.mp4").read_bytes()[:4000])
    (films / "whole.mp4").unlink()
    sound = ["-f", "lavfi", "-i", "sine=duration=1", str(films / "sound.mp4")]
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *sound], check=True)
    (films / "notes.txt").write_text("not a film by its name")

    assert prepare(folder, small_model) == 1
    said = capsys.readouterr()
    assert "text.mp4: text.mp4 is no video that can be read" in said.err
    assert "sound.mp4 has no video" in said.err
    assert "three.mp4 0.0 to 0.1 s: left out, 0.1 s between two cuts: a clip needs 2.7 s" in said.out
    assert "cut-off.mp4" in said.out + said.err
    assert "a/good.mp4 0.0 to 2.7 s: a_good.mp4-1" in said.out
    assert [clip.name for clip in open_data(folder / "data")] == ["a_good.mp4-1"]
    page = (folder / "data" / "report.html").read_text()
    assert all(name in page for name in ("text.mp4", "sound.mp4", "three.mp4", "a clip needs 2.7 s"))

    # Said again where it holds, though the rest is not done again.
    assert prepare(folder, small_model) == 1
    again = capsys.readouterr()
    assert again.err == said.err and again.out == said.out


def test_cuts_split_a_film_and_short_pieces_are_left_out(folder, small_model, capsys):
    make_film(folder, "film.mp4", 240)
    shots = [moving(100, 1), moving(30, 2), moving(110, 3)]
    write_mp4(folder / "films" / "film.mp4", np.concatenate(shots))
    assert prepare(folder, small_model) == 0
    first, second = open_data(folder / "data")
    assert (first.name, second.name) == ("film.mp4-1", "film.mp4-3")
    assert first.info.start == 0 and second.info.start == pytest.approx(130 / 30)
    assert "1.0 s between two cuts" in capsys.readouterr().out


def test_portrait_films_take_a_portrait_size(folder, small_model):
    make_film(folder, "flat.mp4")
    flat = folder / "films" / "flat.mp4"
    turn = ["-display_rotation", "90", "-i", str(flat), "-c", "copy", str(folder / "films" / "phone.mp4")]
    subprocess.run([get_ffmpeg_exe(), "-loglevel", "error", *turn], check=True)
    shutil.copy(folder / "poses" / "flat.txt", folder / "poses" / "phone.txt")
    assert prepare(folder, small_model) == 0
    flat_clip, phone_clip = open_data(folder / "data", load_config(small_model))
    assert flat_clip.size == (32, 48) and phone_clip.size == (48, 32)
    turned = np.rot90(flat_clip.read("picture").numpy())
    assert np.abs(turned.astype(int) - phone_clip.read("picture").numpy()).mean() < 3


def test_poses_that_end_early_shorten_the_clip_and_too_few_leave_it_out(folder, small_model, capsys):
    for name, kept in (("half.mp4", 120), ("little.mp4", 40)):
        make_film(folder, name, 200)
        poses = folder / "poses" / Path(name).with_suffix(".txt")
        poses.write_text("\n".join(poses.read_text().splitlines()[: kept + 1]))
    assert prepare(folder, small_model) == 0
    (clip,) = open_data(folder / "data")
    assert (clip.info.source, clip.chunks) == ("half.mp4", 1)
    assert "little.mp4 0.0 to 6.7 s: left out, the camera was tracked for 1.3 s only" in capsys.readouterr().out


def test_damaged_poses_cost_one_film(folder, small_model, capsys):
    make_film(folder, "bad.mp4")
    make_film(folder, "good.mp4")
    (folder / "poses" / "bad.txt").write_text("1 2 3\n")
    assert prepare(folder, small_model) == 1
    assert "bad.txt: a line has 3 values" in capsys.readouterr().err
    assert [clip.info.source for clip in open_data(folder / "data")] == ["good.mp4"]


def test_what_is_there_is_not_made_again(folder, small_model):
    make_film(folder, "a.mp4")
    make_film(folder, "b.mp4")
    assert prepare(folder, small_model) == 0
    paths = {clip.info.source: clip.path for clip in open_data(folder / "data")}
    before = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    write_mp4(folder / "films" / "b.mp4", moving(100, 5))
    (folder / "data" / ".keyframes-of-a-killed-run").mkdir()
    with claimed(folder / "data" / "sources.json"):
        assert prepare(folder, small_model) == 2  # another run is at it
    assert prepare(folder, small_model) == 0
    assert not list((folder / "data").glob(".keyframes-*"))
    after = {name: path.stat().st_mtime_ns for name, path in paths.items()}
    assert after["a.mp4"] == before["a.mp4"] and after["b.mp4"] > before["b.mp4"]


def test_an_error_is_tried_again_and_a_part_that_is_done_is_kept(folder, small_model, monkeypatch):
    from infworld.videos import prepare as module

    make_film(folder, "film.mp4", 240)
    write_mp4(folder / "films" / "film.mp4", np.concatenate([moving(120, 1), moving(120, 2)]))
    written = []

    def once(path, info, tensors):
        written.append(path.stem)
        if len(written) == 2:
            raise ValueError("the disk is full")
        real(path, info, tensors)

    real = module.write_clip
    monkeypatch.setattr(module, "write_clip", once)
    assert prepare(folder, small_model) == 1
    assert prepare(folder, small_model) == 0
    assert written == ["film.mp4-1", "film.mp4-2", "film.mp4-2"]
    assert len(open_data(folder / "data")) == 2


def test_another_model_or_other_poses_need_another_folder(folder, small_model, capsys):
    make_film(folder, "a.mp4")
    assert prepare(folder, small_model) == 0
    assert prepare(folder, small_model, "--axes", "opengl") == 2
    assert "was made with axes 'opencv': choose another folder for --out" in capsys.readouterr().err
    (folder / "data" / "sources.json").write_text("{}")
    assert prepare(folder, small_model) == 2
    assert "sources.json cannot be read" in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_no_half_clip(folder, small_model, capsys):
    """A limit on the size of files stands for a full disk: writing fails in the same way, in the middle of a file."""
    make_film(folder, "a.mp4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        assert prepare(folder, small_model) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert "choose a folder that is writable and has space" in capsys.readouterr().err
    assert not list((folder / "data" / "clips").iterdir())
    assert not list((folder / "data").glob(".keyframes-*"))
    assert prepare(folder, small_model) == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nowhere"], "no folder nowhere"),
        (["."], "has no video files"),
    ],
)
def test_a_folder_without_films_is_an_error(tmp_path, small_model, monkeypatch, capsys, arguments, problem):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--out", "data", "--model", str(small_model)]) == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("text", "problem"), [("[1]", "must be a JSON object"), ("{", "cannot read"), ('{"b.mp4": "x"}', "b.mp4")]
)
def test_captions_that_fit_no_film_are_an_error(folder, small_model, capsys, text, problem):
    make_film(folder, "a.mp4")
    (folder / "captions.json").write_text(text)
    assert prepare(folder, small_model, "--captions", str(folder / "captions.json")) == 2
    assert problem in capsys.readouterr().err


def test_long_shots_are_split_evenly():
    assert list(split([(0, 100), (100, 350)], 100)) == [(0, 100), (100, 183), (183, 266), (266, 350)]


# With COLMAP

needs_colmap = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import pycolmap"], capture_output=True).returncode != 0, reason="no pycolmap"
)


def photograph() -> Image.Image:
    """Something with detail at every scale."""
    rng = np.random.default_rng(0)
    height, width = SIZES["photos"]
    picture = np.zeros((height, width, 3))
    for scale in (4, 8, 16, 32, 64):
        noise = rng.uniform(0, 255, (height // scale + 1, width // scale + 1, 3)).astype(np.uint8)
        picture += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC), float)
    return Image.fromarray(np.clip((picture / 5 - 127) * 2 + 127, 0, 255).astype(np.uint8))


def stage_film(path: Path, *segments) -> np.ndarray:
    """A walk before a photograph, as a film; returns what was done."""
    photos = make_atlas([photograph()], SIZES["photos"])
    flat, actions = flat_walk(*segments)
    stages = framing_stages(photos, torch.zeros(1, dtype=torch.int64))
    write_mp4(path, render_stages(stages, photos, flat, 120, 160, supersample=1)[0].numpy())
    return actions


@needs_colmap
def test_a_walk_is_found_by_its_pictures_alone(folder, small_model):
    actions = stage_film(folder / "films" / "walk.mp4", (AHEAD, 40), (LEFT, 36), (BACK, 44))
    assert prepare(folder, small_model) == 0
    (clip,) = open_data(folder / "data")
    found = clip.actions.numpy()[:, :80]
    first = round(clip.info.start * 30)
    certain = (found != 9).all(0)
    right = (found == actions[:, first : first + 80]).all(0)
    assert clip.info.poses == "colmap" and 70 < clip.info.fov_degrees < 90
    assert certain.mean() > 0.85 and right[certain].mean() > 0.9


@needs_colmap
def test_a_camera_that_turns_and_one_that_stands_still_need_no_places(folder, small_model, capsys):
    actions = stage_film(folder / "films" / "turn.mp4", (LEFT, 30), (RIGHT, 50))
    write_mp4(folder / "films" / "still.mp4", np.repeat(np.asarray(photograph())[None, 100:220, 100:260], 81, 0))
    write_mp4(folder / "films" / "void.mp4", np.full((81, 120, 160, 3), 90, np.uint8))
    assert prepare(folder, small_model) == 0
    still, turn = open_data(folder / "data")
    assert still.info.poses == turn.info.poses == "turning"
    assert (still.actions[:, :80] == 0).all()
    assert (turn.actions[0, :80] == 0).all() and (turn.actions[1, :80].numpy() == actions[1]).mean() > 0.9
    assert turn.info.pace == 0.0
    assert "void.mp4 0.0 to 2.7 s: left out, the camera was tracked for 0.0 s only" in capsys.readouterr().out
    assert "the camera only turned" in (folder / "data" / "report.html").read_text()


@needs_colmap
def test_colmap_failing_costs_one_clip_and_stopping_leaves_nothing_behind(folder, small_model, monkeypatch, capsys):
    write_mp4(folder / "films" / "a.mp4", moving(81))
    broken = folder / "broken"
    (broken / "pycolmap").mkdir(parents=True)
    (broken / "pycolmap" / "__init__.py").write_text("raise SystemExit('Check failed: it broke')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    make_film(folder, "b.mp4")
    assert prepare(folder, small_model) == 0
    assert "left out, no camera poses: COLMAP ended with code 1: Check failed: it broke" in capsys.readouterr().out
    assert [clip.info.source for clip in open_data(folder / "data")] == ["b.mp4"]

    (broken / "pycolmap" / "__init__.py").write_text("import time; time.sleep(60)")
    shutil.rmtree(folder / "data")
    command = [sys.executable, "-m", "infworld", "prepare-videos", str(folder / "films"), "--out", str(folder / "data")]
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}{broken}"}
    process = subprocess.Popen([*command, "--model", str(small_model)], env=environment, stderr=subprocess.PIPE)
    while process.poll() is None and not list((folder / "data").glob(".keyframes-*/0/log.txt")):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert b"the same command goes on" in process.stderr.read()
    assert not list((folder / "data").glob(".keyframes-*"))


def test_the_round_trip_counts_what_is_found_again(folder, small_model, capsys):
    """The measurement of docs/own-videos.md at a small size, with the true poses in place of estimated ones."""
    path = folder / "films" / "walk"
    size = ["--size", "48", "64", "--frames", "90", "--kind", "toy", "--seed", "1"]
    round_trip.main(["make", str(path), *size, "--jitter", "1"])
    with np.load(path.with_suffix(".npz")) as truth:
        poses = poses_to_matrices(torch.from_numpy(truth["poses"])).numpy()
        moves = truth["move"].copy()
    (folder / "poses").mkdir()
    np.save(folder / "poses" / "walk.npy", poses)
    assert prepare(folder, small_model) == 0
    (clip,) = open_data(folder / "data")
    found = round_trip.compare(clip, path.with_suffix(".npz"))
    assert found.uncertain < 0.15 and found.right > 0.9
    capsys.readouterr()
    round_trip.main(["compare", str(folder / "data"), str(folder / "films")])
    assert f"| walk.mp4-1 | file | 81 | {100 * found.uncertain:.1f} %" in capsys.readouterr().out

    wrong = {"poses": poses, "move": (moves + 1) % 9, "view": np.zeros(90, int)}
    np.savez(path.with_suffix(".npz"), **wrong)
    assert round_trip.compare(clip, path.with_suffix(".npz")).moves_right == 0
