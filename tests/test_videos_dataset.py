"""Clips on disk: what is written is read back, in parts, and nothing of another form passes for a clip."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from infworld.actions import UNCERTAIN
from infworld.config import ModelConfig, from_dict, load_config
from infworld.videos.dataset import FORMAT, Clip, ClipInfo, open_data, vae_fingerprint, write_clip
from tests.conftest import SMALL_MODEL

CHUNKS, FRAMES = 3, 241


def tensors(chunks: int = CHUNKS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = 1 + 80 * chunks

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "history": noise(1 + 20 * chunks, 16, 4, 6),
        "targets": noise(chunks, 21, 16, 4, 6),
        "picture": torch.randint(256, (32, 48, 3), generator=generator),
        "move": torch.randint(10, (frames,), generator=generator),
        "view": torch.randint(9, (frames,), generator=generator),
        "poses": torch.eye(4).repeat(frames, 1, 1),
        "returns": torch.full((frames,), -1),
    }


@pytest.fixture
def config(small_model) -> ModelConfig:
    return load_config(small_model)


@pytest.fixture
def info(config) -> ClipInfo:
    return ClipInfo("film.mp4", 1.5, 9.5, config.name, vae_fingerprint(config), caption="a garden")


@pytest.fixture
def clip(tmp_path, info) -> Clip:
    write_clip(tmp_path / "clips" / "film-1.safetensors", info, tensors())
    return Clip(tmp_path / "clips" / "film-1.safetensors")


def test_a_clip_reads_as_it_was_written(clip, info):
    written = tensors()
    assert clip.info == info
    assert (clip.name, clip.chunks, clip.frames, clip.size) == ("film-1", CHUNKS, FRAMES, (32, 48))
    assert torch.equal(clip.read("history"), written["history"].half())
    assert torch.equal(clip.read("targets", 1, 2), written["targets"][1:2].half())
    assert torch.equal(clip.actions, torch.stack([written["move"], written["view"]]))
    assert clip.uncertain == pytest.approx((written["move"][:-1] == UNCERTAIN).float().mean())


@pytest.mark.parametrize(("start", "chunks"), [(0, 0), (0, 2), (1, 1), (2, 0)])
def test_a_sample_is_history_and_the_next_chunk(clip, start, chunks):
    written, sample = tensors(), clip.sample(start, chunks)
    known, end = 1 + 20 * chunks, start + chunks
    fresh = written["targets"][start].half().float()[:known]
    own = written["history"].half().float()[20 * start : 20 * start + known]
    assert sample.history.shape == (16, known, 4, 6)
    assert torch.equal(sample.history[:, :21].movedim(1, 0), fresh)
    assert torch.equal(sample.history[:, 21:].movedim(1, 0), own[21:])
    assert torch.equal(sample.target.movedim(1, 0), written["targets"][end].half().float())
    assert torch.equal(sample.move, written["move"][80 * end : 80 * end + 81])
    assert sample.caption == "a garden"


@pytest.mark.parametrize(("start", "chunks"), [(-1, 1), (0, 3), (3, 0), (1, -1)])
def test_a_sample_beyond_the_clip_is_an_error(clip, start, chunks):
    with pytest.raises(ValueError, match="film-1 has chunks 0 to 2"):
        clip.sample(start, chunks)


def test_needs_are_the_frames_that_come_back_to_what_the_history_saw(tmp_path, info):
    returns = torch.full((FRAMES,), -1)
    returns[161:201] = 10  # half of chunk 2 shows what chunk 0 showed
    write_clip(tmp_path / "a.safetensors", info, {**tensors(), "returns": returns})
    clip = Clip(tmp_path / "a.safetensors")
    assert clip.needs(2).tolist() == [0.5]
    assert clip.needs(1).tolist() == [0.0, 0.0]  # a history of chunk 1 alone has not seen it


def test_a_folder_opens_for_its_own_vae_alone(clip, config, tmp_path):
    assert [found.name for found in open_data(tmp_path, config)] == ["film-1"]
    with pytest.raises(ValueError, match=r"made with the VAE .* of 'small'.*--model tiny"):
        open_data(tmp_path, load_config("tiny"))
    other = dataclasses.replace(config, buckets=((64, 48),))
    with pytest.raises(ValueError, match="of 32x48, which is no size of 'small'"):
        open_data(tmp_path, other)


def test_the_fingerprint_is_that_of_the_weights_and_their_normalisation(config):
    changed = from_dict(
        ModelConfig, {**SMALL_MODEL, "vae_cfg": {**SMALL_MODEL["vae_cfg"], "latents_mean": [0.5] * 16}}, "test"
    )
    changed = dataclasses.replace(changed, source=config.source)
    assert vae_fingerprint(config) == vae_fingerprint(config) != vae_fingerprint(changed)


def test_a_missing_or_empty_folder_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="infworld prepare-videos"):
        open_data(tmp_path / "none")
    with pytest.raises(ValueError, match="has no clips"):
        open_data(tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"move": torch.zeros(240)}, "no whole chunks"),
        ({"history": torch.zeros(60, 16, 4, 6)}, "history is"),
        ({"picture": torch.zeros(32, 48)}, "picture is"),
        ({"returns": None}, r"missing or extra tensors \(returns\)"),
        ({"more": torch.zeros(1)}, r"missing or extra tensors \(more\)"),
    ],
)
def test_misshapen_tensors_are_named_and_not_written(tmp_path, info, change, problem):
    wrong = {name: tensor for name, tensor in {**tensors(), **change}.items() if tensor is not None}
    with pytest.raises(ValueError, match=problem):
        write_clip(tmp_path / "a.safetensors", info, wrong)
    assert not list(tmp_path.iterdir())


def test_another_file_is_no_clip(clip, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no clip"):
        Clip(path)
    save_file({"x": torch.zeros(1)}, path, {"format": FORMAT, "clip": json.dumps({"source": "a"})})
    with pytest.raises(ValueError, match="does not say what clip it is"):
        Clip(path)
    path.write_bytes(clip.path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        Clip(path)


def test_an_unknown_action_is_an_error(tmp_path, info):
    write_clip(tmp_path / "a.safetensors", info, {**tensors(), "move": torch.full((FRAMES,), 10)})
    with pytest.raises(ValueError, match="has an action 10"):
        _ = Clip(tmp_path / "a.safetensors").actions
