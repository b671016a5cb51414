"""Attention by another kernel: taken where it is faster and right, left out where it is absent, wrong or fails."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import infworld
from infworld import kernels
from infworld.config import load_config
from infworld.dit import InfiniteWorldTransformer
from infworld.layers import LOCAL, TokenLayout, WithKernel


@pytest.fixture
def config(small_model):
    return load_config(small_model)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return InfiniteWorldTransformer(config.model_cfg)


class Fast:
    """Knows the answers that it has given before, as often as it may."""

    def __init__(self, change=lambda x: x):
        self.answers, self.change, self.used = {}, change, 0

    def __call__(self, q, k, v):
        self.used += 1
        if (key := (q.data_ptr(), q.shape, k.shape)) not in self.answers:
            self.answers = {key: self.change(F.scaled_dot_product_attention(q, k, v))}
        return self.answers[key]


def test_torchs_own_is_kept_where_no_other_is_installed(model, config):
    assert kernels.use_fastest(model, config) is None
    assert all(block.self_attn.kernel is F.scaled_dot_product_attention for block in model.blocks)


def test_a_faster_one_that_is_right_is_used_by_every_block(model, config, monkeypatch):
    fast = Fast()
    monkeypatch.setattr(kernels, "KERNELS", {"fast": lambda: fast})
    assert kernels.use_fastest(model, config) == "fast" and model.narrow_kernel is None
    fast.used, text = 0, torch.randn(1, 4, model.config.caption_channels)
    noisy, history = (torch.randn(1, model.config.out_channels, n, 4, 6) for n in (3, 1))
    actions = torch.zeros(1, 9, dtype=torch.long)
    with torch.no_grad():
        model(noisy, torch.tensor([500.0]), history, actions, actions, text, torch.ones(1, 4))
    assert fast.used >= 2 * len(model.blocks) - 1  # memory's and noise's; the last block's memory step is not needed


@pytest.mark.parametrize(
    ("change", "said"), [(lambda x: 1.05 * x, "is off by"), (lambda x: x * torch.nan, "is off by nan")]
)
def test_a_wrong_one_is_left_out_and_named(model, config, monkeypatch, caplog, change, said):
    monkeypatch.setattr(kernels, "KERNELS", {"fast": lambda: Fast(change)})
    with caplog.at_level(logging.WARNING):
        assert kernels.use_fastest(model, config) is None
    assert f"fast {said}" in caplog.text and model.blocks[0].self_attn.kernel is F.scaled_dot_product_attention


def test_one_that_fails_is_left_out_and_the_next_is_tried(model, config, monkeypatch, caplog):
    def fails(q, k, v):
        raise RuntimeError("no kernel image is available for this card")

    def broken():
        raise ImportError("undefined symbol: aoti_torch")

    monkeypatch.setattr(kernels, "KERNELS", {"old": lambda: fails, "broken": broken, "fast": Fast})
    with caplog.at_level(logging.WARNING):
        assert kernels.use_fastest(model, config) == "fast"
    assert "old does not run here and is left out" in caplog.text and "no kernel image" in caplog.text
    assert "broken does not run here and is left out: undefined symbol" in caplog.text


def test_tokens_come_first_in_flash_attention_and_only_the_result_is_taken():
    q, k, v = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))

    def tokens_first(q, k, v):
        assert q.shape == (1, 3, 2, 8) and k.shape == v.shape == (1, 5, 2, 8)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), "more"

    found = kernels._tokens_first(tokens_first)(q, k, v)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v))


# --- 8 bits


@pytest.fixture
def flash_attention(monkeypatch):
    """What FlashAttention-3 does with 8 bits, in plain torch."""

    def flash_attn_func(q, k, v, q_descale, k_descale, v_descale):
        assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn
        heads = [
            (x.float() * s[:, None, :, None]).transpose(1, 2)
            for x, s in zip((q, k, v), (q_descale, k_descale, v_descale), strict=True)
        ]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2), "more"

    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", SimpleNamespace(flash_attn_func=flash_attn_func))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_head_has_its_own_scale(dtype):
    x = torch.randn(1, 50, 3, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    numbers, scales = kernels.to_8_bits(x.to(dtype))
    assert numbers.dtype == torch.float8_e4m3fn and scales.shape == (1, 3) and scales.dtype == torch.float32
    back = numbers.float() * scales[:, None, :, None]
    assert back.isfinite().all()
    error = (back - x).abs().amax(dim=(0, 1, 3)) / x.abs().amax(dim=(0, 1, 3))
    assert (error < 1 / 24).all()  # half a step of an eighth, and rounding
    assert kernels.to_8_bits(torch.zeros(1, 2, 1, 4))[0].float().eq(0).all()


def test_attention_in_8_bits_is_attention(flash_attention):
    q, k, v = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)) for n in (30, 70, 71))
    v = v[:, :, :70]
    found, expected = kernels.flash_attention_3_in_8_bits()(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert found.shape == expected.shape
    assert 1e-4 < (found - expected).abs().max() / expected.abs().max() < kernels.ERROR_OF_8_BITS


@pytest.mark.parametrize(("error", "kept"), [(1.1, True), (1.2, False)])
def test_8_bits_are_allowed_their_error_and_no_more(model, config, monkeypatch, error, kept):
    narrow = Fast(lambda x: error * x)
    monkeypatch.setattr(kernels, "NARROW_KERNELS", {"narrow": lambda: narrow})
    assert kernels.use_fastest(model, config) is None
    assert (model.narrow_kernel is narrow) == kept
    assert all(block.self_attn.kernel is F.scaled_dot_product_attention for block in model.blocks)


@pytest.mark.parametrize(("preset", "narrow"), [("exact", False), ("balanced", False), ("fast", True)])
def test_only_the_steps_of_fast_attend_in_8_bits(small_model, picture, preset, narrow):
    world = infworld.load(small_model, device="cpu")
    calls = []

    def counted(q, k, v):
        calls.append(q.shape)
        return F.scaled_dot_product_attention(q, k, v)

    session = world.start(picture, preset=preset)
    expected = world.next_chunk(session).latents
    world.transformer.narrow_kernel = counted
    found = world.next_chunk(session).latents
    assert torch.equal(found, expected)
    steps = session.settings.steps
    assert len(calls) == (steps * len(world.transformer.blocks) if narrow else 0)


def test_on_several_devices_tokens_are_exchanged_around_the_other_kernel():
    def elsewhere(kernel, q, k, v):
        return kernel(q, k, v) + 1

    class Split(TokenLayout):
        def attention(self, *lengths):
            return elsewhere

    q, k, v = torch.randn(3, 1, 2, 5, 4)
    twice = WithKernel(Split(), lambda q, k, v: 2 * q).attention(3, 2)
    assert torch.equal(twice(F.scaled_dot_product_attention, q, k, v), 2 * q + 1)
    here = WithKernel(LOCAL, lambda q, k, v: 2 * q).attention(3, 2)
    assert torch.equal(here(F.scaled_dot_product_attention, q, k, v), 2 * q)
