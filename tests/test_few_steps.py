"""Few steps: what is learned is the teacher's whole way; who knows it has no loss, the teacher itself has one."""

import pytest
import torch

from infworld.config import SamplerConfig
from infworld.sampler import MAX_TIMESTEP, sample, schedule
from infworld.training.few_steps import few_steps_loss

SAMPLER, SPREAD = SamplerConfig(shift=3.0, num_sampling_steps=8), 0.3
DATA = SPREAD * torch.randn(4000, 1, 1, 1, 1, generator=torch.Generator().manual_seed(0))


def deviation(t):
    """Of noisy data of a normal distribution: the exact flow scales every sample by it."""
    return (t**2 + ((1 - t) * SPREAD) ** 2).sqrt()


def teacher(z, t):
    """The exact velocity for such data."""
    return z * (t - (1 - t) * SPREAD**2) / deviation(t) ** 2


def jump(steps):
    """The velocity that leads to the end of the segment at once."""
    ends = schedule(SAMPLER, steps, end_at_zero=True) / MAX_TIMESTEP

    def velocity(z, t):
        below = [ends[ends < point - 1e-6] for point in t.flatten()]  # none where there is no way left
        end = torch.stack([points.max() if len(points) else -t.new_ones(()) for points in below]).view_as(t)
        return (z - z * deviation(end) / deviation(t)) / (t - end)

    return velocity


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_whole_way_at_once_has_next_to_no_loss(steps):
    torch.manual_seed(0)
    known = few_steps_loss(jump(steps), jump(steps), teacher, DATA, SAMPLER, steps)
    unknown = few_steps_loss(teacher, teacher, teacher, DATA, SAMPLER, steps)
    assert known < 2e-3 and unknown > 10 * known


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_steps_of_euler_end_where_the_segments_do(steps):
    """Sampled with as many steps, the student's data are the teacher's of the same noise."""
    noise = torch.randn(500, 1, 1, 1, 1, generator=torch.Generator().manual_seed(1))
    few = schedule(SAMPLER, steps, end_at_zero=True)
    student = jump(steps)
    made = sample(lambda z, t: student(z, t.expand(len(z)).view(-1, 1, 1, 1, 1) / MAX_TIMESTEP), noise, few)
    torch.testing.assert_close(made, SPREAD * noise, atol=1e-4, rtol=1e-4)


def test_only_the_student_learns():
    scale = torch.ones((), requires_grad=True)
    learning, still = (lambda z, t: scale * z), (lambda z, t: 0 * z)
    assert few_steps_loss(learning, still, still, DATA, SAMPLER, 2).requires_grad
    assert not few_steps_loss(still, learning, learning, DATA, SAMPLER, 2).requires_grad
