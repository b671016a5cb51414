"""Random weights: files as the released ones are, which load by the normal path and make a film of finite numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL_MODEL, SMALL_UMT5_MODEL

import infworld
from infworld.checkpoint import RELEASED_EXTRAS, read_tensors
from infworld.cli import random_checkpoint as script
from infworld.config import ModelConfig, from_dict, load_config
from infworld.text import load_tokenizer

MANIFEST = json.loads((Path(__file__).parent / "checkpoint_manifest.json").read_text())
SMALL = from_dict(ModelConfig, SMALL_UMT5_MODEL, "small")


def test_names_and_shapes_are_the_released_ones():
    files = script.weight_files(load_config("infinite-world"))
    found = {name: {key: list(shape) for key, shape in shapes.items()} for name, (shapes, _) in files.items()}
    assert found == {name: MANIFEST[name] for name in found} and len(found) == 3


def test_files_have_the_released_formats_and_dtypes(random_model):
    folder = random_model.parent
    content = torch.load(folder / script.TRANSFORMER, weights_only=True)
    assert list(content) == ["state_dict"] and set(RELEASED_EXTRAS) < set(content["state_dict"])
    expected = script.weight_files(SMALL)
    for name, (shapes, dtype) in expected.items():
        tensors = {key: t for key, t in read_tensors(folder / name).items() if key not in RELEASED_EXTRAS}
        assert {key: t.shape for key, t in tensors.items()} == shapes
        assert {t.dtype for t in tensors.values()} == {dtype}
        assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)  # none is stored as part of another
    assert [dtype for _, dtype in expected.values()] == [torch.float32, torch.float32, torch.bfloat16]


def test_numbers_neither_grow_nor_repeat():
    noise = torch.randn(10_007, generator=torch.Generator().manual_seed(0))
    shapes = {"a.weight": torch.Size((300, 100)), "b.gamma": torch.Size((9, 1, 1)), "b.bias": torch.Size((9,))}
    shapes |= {"norm.weight": torch.Size((9,)), "c.weight": torch.Size((400, 8, 3))}
    tensors = script.random_tensors(shapes, noise)
    assert tensors["a.weight"].std() == pytest.approx(100**-0.5, rel=0.05)
    assert tensors["c.weight"].std() == pytest.approx(24**-0.5, rel=0.05)
    assert len(tensors["a.weight"].unique(dim=0)) == 300
    assert (tensors["b.gamma"] == 1).all() and (tensors["norm.weight"] == 1).all() and (tensors["b.bias"] == 0).all()


def test_the_tokenizer_knows_any_text_within_the_vocabulary(random_model, tmp_path):
    tokenizer = load_tokenizer(random_model.parent / script.TOKENIZER)
    ids = tokenizer("A snowy street, at night — 雪")["input_ids"]
    assert (
        ids[-1] == tokenizer.eos_token_id == 1 and 2 in ids and len(set(ids)) > 8
    )  # 2 stands for what it cannot spell
    assert max(ids) < SMALL.text_encoder_cfg.vocab and tokenizer.pad_token_id == 0
    script.make_tokenizer(tmp_path, vocab=20)
    assert max(load_tokenizer(tmp_path)("zebra ZEBRA")["input_ids"]) < 20


def test_the_model_loads_and_films(random_model, picture):
    world = infworld.load(random_model, "cpu")
    first, second = (
        list(world.rollout(picture, "forward 80", prompt, num_frames=161, seed=1))[-1] for prompt in ("snow", "a wood")
    )
    for chunk in (first, second):
        assert chunk.latents.isfinite().all() and chunk.frames.std() > 1
    assert not torch.equal(first.latents, second.latents)  # the text arrives


def test_the_same_seed_writes_the_same(random_model, tmp_path):
    same, other = script.make(tmp_path / "same", SMALL), script.make(tmp_path / "other", SMALL, seed=1)

    def first(settings):
        return read_tensors(settings.parent / script.TRANSFORMER)["patch_embedding.weight"]

    assert torch.equal(first(same), first(random_model)) and not torch.equal(first(same), first(other))


def test_what_cannot_be_is_said(tmp_path, monkeypatch, capsys, random_model):
    before = random_model.stat().st_mtime_ns
    assert script.main([str(random_model.parent)]) == 2
    assert "is there already: use --overwrite" in capsys.readouterr().err and random_model.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="must be umt5.*not 'bytes'"):
        script.make(tmp_path, from_dict(ModelConfig, SMALL_MODEL, "small"))
    usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"has 1.0 GB free and 1.1 GB are needed"):
        script.make(tmp_path, SMALL)
    assert not list(tmp_path.iterdir())
