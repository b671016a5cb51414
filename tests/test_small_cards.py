"""A film on a card that it does not fit on whole: what passes through the GPU in turn changes no number."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch

from infworld.config import TransformerConfig
from infworld.dit import KEEP, InfiniteWorldTransformer
from infworld.memory import WINDOW, MemoryCompressor, window_starts
from infworld.offload import PassingTensors

SIZES = TransformerConfig(
    dim=48, ffn_dim=96, freq_dim=32, num_heads=4, num_layers=5, caption_channels=16,
    memory_hidden_dim=32, memory_num_heads=2, action_embed_dim=8, action_hidden_dim=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def transformer() -> InfiniteWorldTransformer:
    torch.manual_seed(0)
    return InfiniteWorldTransformer(SIZES).eval().requires_grad_(False)


@torch.inference_mode()
def velocities(model: InfiniteWorldTransformer, keep: str) -> torch.Tensor:
    """Two steps of one chunk, so that what is kept is gone through twice."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    memory, text = draw(1, 16, 3, 4, 6), draw(1, 7, SIZES.caption_channels)
    actions, noise = draw(1, 5, SIZES.dim), draw(1, 16, 5, 4, 6)
    context = model.embed_text(text, torch.ones(1, 7))
    stream = model.encode_memory(memory, context, keep)
    return torch.cat([model.denoise(noise, torch.tensor([t]), stream, actions, context) for t in (900.0, 500.0)])


@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("offloaded", [False, True])
def test_where_blocks_and_streams_are_kept_changes_nothing(transformer, keep, offloaded):
    model = copy.deepcopy(transformer)
    if offloaded:
        model.offload_blocks()
    assert torch.equal(velocities(model, keep), velocities(transformer, "gpu"))


def test_offloaded_blocks_keep_their_names_and_weights(transformer):
    model = copy.deepcopy(transformer)
    model.offload_blocks()
    before, after = transformer.state_dict(), model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_offloaded_blocks_are_compiled_no_more(transformer):
    """A compiled step belongs to the block it was made from, whose weights are no longer where it works."""
    model = copy.deepcopy(transformer)
    for block in model.blocks:
        block.noisy_step = block.memory_step = None
    model.offload_blocks()
    assert torch.equal(velocities(model, "gpu"), velocities(transformer, "gpu"))


def test_at_most_two_of_what_passes_are_there_at_once():
    tensors = [torch.full((2, 3), float(i)) for i in range(6)]
    passing = PassingTensors(iter(tensors))
    assert len({tensor.data_ptr() for tensor in passing}) == 2
    for seen, tensor in zip(passing, tensors, strict=True):
        assert torch.equal(seen, tensor)


def test_going_through_may_stop_anywhere_and_start_again():
    passing = PassingTensors(torch.full((2,), float(i)) for i in range(4))
    assert [float(tensor[0]) for tensor in islice(passing, 2)] == [0, 1]
    assert [float(tensor[0]) for tensor in passing] == [0, 1, 2, 3]


@torch.inference_mode()
def test_windows_one_by_one_equal_windows_together():
    torch.manual_seed(0)
    compressor = MemoryCompressor(16, 32, 2).eval()
    history = torch.randn(1, 16, 101, 4, 6)
    windows = torch.cat([history[:, :, start : start + WINDOW] for start in window_starts(101)])
    together = torch.cat(compressor.encode(windows).split(1), dim=2)
    expected = compressor.encode(together)  # whose convolutions may round otherwise for a batch
    assert (compressor.compress(history) - expected).norm() < 1e-5 * expected.norm()
