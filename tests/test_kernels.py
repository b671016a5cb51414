"""Attention by another kernel: taken where it is faster and right, left out where it is absent, wrong or fails."""

import logging

import pytest
import torch
import torch.nn.functional as F

from infworld import kernels
from infworld.config import load_config
from infworld.dit import InfiniteWorldTransformer


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
    assert kernels.use_fastest(model, config) == "fast"
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
