"""A model that begins with the blocks of another: what is copied, and the maps between their tokens."""

from __future__ import annotations

import pytest
import torch
from conftest import SMALL_MODEL
from einops import rearrange
from torch import Tensor

from infworld.config import ModelConfig, from_dict
from infworld.training import transplant as module
from infworld.training.train_world import Trainee, load_weights
from infworld.training.transplant import draw_tokens, fit, main, r_squared, transplant

PATCH, CHANNELS = 2, 16


def config_of(**sizes) -> ModelConfig:
    settings = SMALL_MODEL | {"model_cfg": SMALL_MODEL["model_cfg"] | sizes, "buckets": [[64, 96]]}
    return from_dict(ModelConfig, settings, "settings")


def trained(config: ModelConfig) -> Trainee:
    """Random weights of a size that shows in what comes out."""
    torch.manual_seed(0)
    model = Trainee(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def turned(latents: Tensor, rotation: Tensor) -> Tensor:
    """Latents whose tokens, (channel, row, column) flattened, are those of `latents` times the rotation."""
    tokens = rearrange(latents, "b c t (h p) (w q) -> b t h w (c p q)", p=PATCH, q=PATCH) @ rotation
    return rearrange(tokens, "b t h w (c p q) -> b c t (h p) (w q)", p=PATCH, q=PATCH)


@torch.no_grad()
def velocity(model: Trainee, noisy: Tensor, memory: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    move, view = torch.randint(9, (2, 1, 9), generator=generator)
    ids, mask = model.text.tokenize(["a red tower"])
    network = model.transformer
    context = network.embed_text(model.text(ids, mask), mask)
    stream = network.encode_memory(memory, context)
    return network.denoise(noisy, torch.tensor([700.0]), stream, network.action_encoder(move, view), context)


def test_a_model_of_rotated_tokens_computes_the_rotated_velocity(monkeypatch):
    monkeypatch.setattr(module, "NEW_DIRECTIONS", 0.0)
    source, model = trained(config_of()), Trainee(config_of())
    generator = torch.Generator().manual_seed(1)
    size = CHANNELS * PATCH**2
    rotation = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    nothing = torch.zeros(size)
    transplant(model, source, (rotation.T, nothing), (rotation, nothing))
    noisy, memory = torch.randn(2, 1, CHANNELS, 3, 4, 6, generator=generator)
    expected = velocity(source, noisy, memory[:, :, :2])
    assert expected.std() > 0.1
    found = velocity(model, turned(noisy, rotation), turned(memory[:, :, :2], rotation))
    torch.testing.assert_close(found, turned(expected, rotation), rtol=1e-4, atol=1e-4)


def test_shifted_tokens_are_shifted_back(monkeypatch):
    """A picture's share of noisy tokens brings its shift along; at noise 0 all of it, and velocities lose it again."""
    monkeypatch.setattr(module, "NEW_DIRECTIONS", 0.0)
    source, model = trained(config_of()), Trainee(config_of())
    size = CHANNELS * PATCH**2
    shift = torch.randn(size, generator=torch.Generator().manual_seed(2))
    transplant(model, source, (torch.eye(size), -shift), (torch.eye(size), shift))
    clean, memory = torch.randn(2, 1, CHANNELS, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    tokens = rearrange(shift, "(c p q) -> c 1 p q", p=PATCH, q=PATCH).repeat(1, 1, 2, 3)
    found = velocity(model, clean + tokens, memory[:, :, :2] + tokens)
    expected = velocity(source, clean, memory[:, :, :2]) - tokens
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_of_a_wider_layer_the_largest_units_stay():
    source = trained(config_of())
    with torch.no_grad():
        for block in source.transformer.blocks:
            block.ffn[0].weight[::2] = 0
    model, size = Trainee(config_of(ffn_dim=48)), CHANNELS * PATCH**2
    identity = torch.eye(size), torch.zeros(size)
    transplant(model, source, identity, identity)
    for block, wide in zip(model.transformer.blocks, source.transformer.blocks, strict=True):
        assert torch.equal(block.ffn[0].weight, wide.ffn[0].weight[1::2])
        assert torch.equal(block.ffn[2].weight, wide.ffn[2].weight[:, 1::2])


@pytest.mark.parametrize("sizes", [{"num_layers": 3}, {"ffn_dim": 192}, {"num_heads": 2}])
def test_other_sizes_are_named(sizes):
    size = CHANNELS * PATCH**2
    identity = torch.eye(size), torch.zeros(size)
    with pytest.raises(ValueError, match=next(iter(sizes))):
        transplant(Trainee(config_of(**sizes)), trained(config_of()), identity, identity)


def test_ridge_regression_finds_a_linear_map():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 6, generator=generator), torch.randn(6, 4, generator=generator)
    found = fit(x, x @ weight + 5, ridge=1e-6)
    torch.testing.assert_close(found[0], weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], torch.full((4,), 5.0), atol=1e-3, rtol=1e-3)
    assert r_squared(found, x, x @ weight + 5) > 0.999
    assert r_squared(found, x, torch.randn(500, 4, generator=generator)) < 0


def test_tokens_show_the_same_places(small_model):
    config = module.load_config(small_model)
    first, second = draw_tokens(config, config, None, 1, torch.device("cpu"))
    assert torch.equal(first, second)
    assert first.shape == (9 * 2 * 3, CHANNELS * PATCH**2)
    with pytest.raises(ValueError, match="tokens"):
        draw_tokens(config, config_of(), None, 1, torch.device("cpu"))


def test_the_command_writes_weights_that_a_run_begins_with(tmp_path, small_model):
    main(["--source", str(small_model), "--config", str(small_model), "--walks", "1", "--out", str(tmp_path / "start")])
    model = Trainee(module.load_config(small_model))
    load_weights(tmp_path / "start" / "world.safetensors", model)
    source = module.load_source(module.load_config(small_model))
    for block, expected in zip(model.transformer.blocks, source.transformer.blocks, strict=True):
        for name, tensor in block.state_dict().items():
            torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=2e-3, atol=2e-3)
