"""Memory guidance: what is learned is the velocity with the memory, away from the one with a faint memory."""

import pytest
import torch

from infworld.training.data import Batch
from infworld.training.guidance import FULL_BELOW, guided_loss, strength

WORDS = torch.zeros(300, 1, dtype=torch.int64)
BATCH = Batch(torch.ones(300, 2, 1, 1, 1), torch.zeros(300, 2, 3, 1, 1), WORDS, WORDS, WORDS, WORDS)


def remembering(noisy, timesteps, batch):
    """A velocity that shows how faint the memory is: 1, and more by what its history differs from 1."""
    return torch.ones_like(noisy) + (batch.history[:, :1] - 1).abs()


def test_it_is_full_at_low_noise_and_none_at_pure_noise():
    assert strength(torch.tensor([0.0, 0.5, FULL_BELOW])).tolist() == pytest.approx([1, 1, 1])
    assert strength(torch.tensor(1.0)) == 0 and 0 < strength(torch.tensor(0.97)) < 1


def test_the_aim_is_away_from_what_a_faint_memory_gives():
    """With noise |n| over a memory the teacher gives 1 + |n|: guided it is 1 - g |n| at full strength, on average
    1 - 0.8 g. A student that gives that has the least loss of all constants but for what it can't know."""
    torch.manual_seed(0)

    def loss(answer, guidance):
        return guided_loss(lambda noisy, *_: torch.full_like(noisy, answer), remembering, BATCH, 3.0, guidance).item()

    assert loss(1.0, 0.0) == 0
    answers = torch.linspace(-0.5, 1.5, 41)
    best = {g: answers[int(torch.tensor([loss(a.item(), g) for a in answers]).argmin())].item() for g in (0.5, 1.0)}
    assert best[1.0] < best[0.5] < 1
    assert 1 - best[1.0] == pytest.approx(2 * (1 - best[0.5]), abs=0.15)


def test_only_the_student_learns():
    scale = torch.ones((), requires_grad=True)

    def learning(noisy, timesteps, batch):
        return scale * noisy

    assert guided_loss(learning, remembering, BATCH, 3.0, 1.0).requires_grad
    assert not guided_loss(remembering, learning, BATCH, 3.0, 1.0).requires_grad
