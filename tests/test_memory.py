"""However long the history, the memory stays short, ends with the last latent and has seen the whole of it."""

import pytest
import torch

from infworld.memory import MAX_SINGLE_PASS, WINDOW, WINDOWS, MemoryCompressor, window_starts


@pytest.fixture(scope="module")
def compressor() -> MemoryCompressor:
    """In float64, so that what has to be equal differs by 1e-12 and not by rounding."""
    torch.manual_seed(0)
    return MemoryCompressor(channels=4, hidden=32, num_heads=2).double().eval().requires_grad_(False)


def history(latents: int, batch: int = 1, height: int = 2, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(latents)
    return torch.randn(batch, 4, latents, height, width, generator=generator, dtype=torch.float64)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize(
    ("latents", "compressed"),
    [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (21, 6), (41, 11), (77, 20), (80, 20), (81, 20), (101, 20), (1001, 20)],
)
def test_memory_has_a_quarter_of_the_latents_at_most_20_and_the_last_one(compressor, latents, compressed):
    seen = history(latents)
    memory = compressor(seen)
    assert memory.shape == (1, 4, compressed + 1, 2, 4)
    assert torch.equal(memory[:, :, -1], seen[:, :, -1])
    assert torch.equal(memory[:, :, :-1], compressor.compress(seen))


def test_any_size_of_picture_and_batch_fits(compressor):
    assert compressor(history(5, batch=3, height=3, width=1)).shape == (3, 4, 3, 3, 1)


def test_up_to_80_latents_there_is_one_window():
    assert all(window_starts(latents) == [0] for latents in range(1, MAX_SINGLE_PASS + 1))


@pytest.mark.parametrize(
    ("latents", "starts"),
    [(81, [0, 4, 8, 12, 16]), (84, [0, 5, 10, 15, 20]), (121, [0, 14, 28, 42, 56]), (321, [0, 64, 128, 192, 256])],
)
def test_windows_begin_where_the_spec_puts_them(latents, starts):
    assert window_starts(latents) == starts


def test_windows_lie_inside_the_history_and_reach_its_end():
    for latents in range(MAX_SINGLE_PASS + 1, 1300):
        starts = window_starts(latents)
        assert len(starts) == WINDOWS and starts[0] == 0
        assert latents - 4 < starts[-1] + WINDOW <= latents


def test_windows_leave_no_gap_within_the_trained_horizon():
    longest = 1 + 20 * 15  # latents before the 16th chunk
    for latents in range(MAX_SINGLE_PASS + 1, longest + 1):
        starts = window_starts(latents)
        assert all(after - before <= WINDOW for before, after in zip(starts, starts[1:], strict=False))


def test_up_to_80_latents_the_history_goes_through_once(compressor):
    seen = history(MAX_SINGLE_PASS)
    assert torch.equal(compressor.compress(seen), compressor.encode(seen))


def test_beyond_80_latents_windows_are_compressed_and_then_their_results(compressor):
    seen = history(MAX_SINGLE_PASS + 1, batch=2)
    windows = [compressor.encode(seen[:, :, start : start + WINDOW]) for start in (0, 4, 8, 12, 16)]
    assert difference(compressor.compress(seen), compressor.encode(torch.cat(windows, dim=2))) < 1e-12


@pytest.mark.parametrize("latents", [7, 80, 81])
def test_two_histories_do_not_meet(compressor, latents):
    both = history(latents, batch=2)
    alone = torch.cat([compressor(both[:1]), compressor(both[1:])])
    assert difference(compressor(both), alone) < 1e-12
    assert difference(alone[:1, :, :-1], alone[1:, :, :-1]) > 1e-2


@pytest.mark.parametrize("latents", [80, 81, 121])
@pytest.mark.parametrize("place", [0, 0.3, 0.6])
def test_every_part_of_the_history_is_remembered(compressor, latents, place):
    seen = history(latents)
    changed = seen.clone()
    changed[:, :, int(place * latents)] += 1
    assert difference(compressor.compress(changed), compressor.compress(seen)) > 1e-4


def test_order_is_remembered(compressor):
    seen = history(21)
    assert difference(compressor.compress(seen.flip(2)), compressor.compress(seen).flip(2)) > 1e-2


def test_every_parameter_learns():
    compressor = MemoryCompressor(channels=4, hidden=32, num_heads=2)
    compressor(history(9).float())[:, :, :-1].square().mean().backward()
    silent = [name for name, p in compressor.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
