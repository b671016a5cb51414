"""Converted weights: the same tensors, found without being told, whole or not there at all."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

import infworld
from infworld.checkpoint import RELEASED_EXTRAS, read_tensors
from infworld.cli import convert as script
from infworld.config import load_config

FILES = ["infinite_world_model", "models/Wan2.1_VAE", "models/models_t5_umt5-xxl-enc-bf16"]


@pytest.fixture
def model(random_model, tmp_path):
    """A copy of the random model that may be changed; its config."""
    return shutil.copytree(random_model.parent, tmp_path / "model") / random_model.name


def run(*arguments) -> int:
    return script.main([str(argument) for argument in arguments])


def converted(folder) -> list[str]:
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.safetensors"))


def parts(folder) -> list:
    return list(folder.rglob("*.part"))


def test_tensors_are_the_same_in_the_dtype_that_is_used(model, tmp_path):
    assert run("--model", model, "--out", tmp_path / "new") == 0
    dtypes = [torch.bfloat16, torch.float32, torch.bfloat16]
    for file, suffix, dtype in zip(FILES, (".ckpt", ".pth", ".pth"), dtypes, strict=True):
        old = {k: t for k, t in read_tensors(model.parent / f"{file}{suffix}").items() if k not in RELEASED_EXTRAS}
        new = read_tensors(tmp_path / "new" / f"{file}.safetensors")
        assert new.keys() == old.keys()
        assert all(new[name].dtype == dtype and torch.equal(new[name], old[name].to(dtype)) for name in new)


def test_beside_the_released_files_they_are_found_by_the_same_config(model, picture, monkeypatch):
    before = infworld.load(model, "cpu")
    assert run("--model", model) == 0
    assert converted(model.parent) == sorted(FILES)
    for path in [*model.parent.rglob("*.ckpt"), *model.parent.rglob("*.pth")]:
        path.unlink()  # as one may, to save room
    after = infworld.load(model, "cpu")
    weights = before.transformer.state_dict()
    assert all(torch.equal(t, weights[name].bfloat16().float()) for name, t in after.transformer.state_dict().items())
    assert all(torch.equal(t, before.vae.state_dict()[name]) for name, t in after.vae.state_dict().items())


def test_a_folder_of_its_own_has_all_that_is_needed(model, tmp_path, picture):
    assert run("--model", model, "--out", tmp_path / "new") == 0
    shutil.rmtree(model.parent)
    settings = yaml.safe_load((tmp_path / "new" / "infworld_config.yaml").read_text())
    assert settings["checkpoint_path"] == "infinite_world_model.safetensors"
    os.rename(tmp_path / "new", tmp_path / "moved")
    world = infworld.load(tmp_path / "moved" / "infworld_config.yaml", "cpu")
    (chunk,) = world.rollout(picture, prompt="a text that nobody remembers", num_frames=81)
    assert chunk.latents.isfinite().all()


def test_what_is_there_is_replaced_only_when_asked(model, capsys):
    assert run("--model", model) == 0
    path = model.parent / "infinite_world_model.safetensors"
    path.write_bytes(b"mine")
    assert run("--model", model) == 2
    assert f"{path}" in (said := capsys.readouterr().err) and "--overwrite" in said and path.read_bytes() == b"mine"
    assert run("--model", model, "--overwrite") == 0
    assert read_tensors(path)


def test_an_interruption_leaves_whole_files_only(model, monkeypatch, capsys):
    calls = []

    class Bar(script.tqdm):
        def update(self, n=1):
            calls.append(n)
            if len(calls) == 200:  # in the middle of the second file
                raise KeyboardInterrupt
            return super().update(n)

    monkeypatch.setattr(script, "tqdm", Bar)
    assert run("--model", model) == 130
    assert converted(model.parent) == FILES[:1] and not parts(model.parent)
    assert read_tensors(model.parent / f"{FILES[0]}.safetensors")
    assert run("--model", model, "--overwrite") == 0 and converted(model.parent) == sorted(FILES)


def test_what_a_killed_conversion_left_goes_with_the_next(model):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead = model.parent / f".infinite_world_model.safetensors.{ended.pid}.part"
    alive = model.parent / "models" / f".Wan2.1_VAE.safetensors.{os.getppid()}.part"
    for path in (dead, alive):
        path.write_bytes(b"half")
    assert run("--model", model) == 0
    assert parts(model.parent) == [alive]


def test_without_room_nothing_is_written(model, monkeypatch, capsys):
    usage = shutil.disk_usage(model)._replace(free=10**9)
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: usage)
    assert run("--model", model) == 2
    assert "1.0 GB free and 1.1 GB are needed" in capsys.readouterr().err and not converted(model.parent)


def test_files_that_do_not_fit_are_named_before_anything_is_written(model, capsys):
    text = model.parent / f"{FILES[2]}.pth"
    whole = text.read_bytes()
    text.write_bytes(whole[: len(whole) // 2])
    assert run("--model", model) == 2
    assert f"{text} is truncated" in capsys.readouterr().err
    torch.save(read_tensors(model.parent / f"{FILES[1]}.pth"), text)
    assert run("--model", model) == 2
    assert f"{text} does not fit the model" in capsys.readouterr().err
    text.unlink()
    assert run("--model", model) == 2
    assert "no weight file at" in (said := capsys.readouterr().err) and text.name in said
    assert not converted(model.parent) and not parts(model.parent)


def test_what_is_converted_already_is_said(model, tmp_path, capsys):
    with pytest.raises(ValueError, match="'tiny' has nothing to convert"):
        script.convert(load_config("tiny"))
    run("--model", model, "--out", tmp_path / "new")
    assert run("--model", tmp_path / "new" / "infworld_config.yaml") == 2
    assert "it is converted already" in capsys.readouterr().err
