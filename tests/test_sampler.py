"""From noise to data along a velocity: the schedule's shape, Euler's update, guidance."""

import dataclasses

import pytest
import torch

from infworld.config import SamplerConfig
from infworld.sampler import MAX_TIMESTEP, guide, sample, sample_steps, schedule, settle

RELEASED = SamplerConfig()
STRAIGHT = dataclasses.replace(RELEASED, use_timestep_transform=False)


@pytest.mark.parametrize("config", [RELEASED, STRAIGHT, dataclasses.replace(RELEASED, shift=1.0)])
@pytest.mark.parametrize("steps", [1, 2, 8, 30, 1000])
def test_timesteps_fall_from_1000_to_0(config, steps):
    timesteps = schedule(config, steps)
    assert timesteps.shape == (steps + 1,) and timesteps.dtype == torch.float32
    assert timesteps[0] == 1000 and timesteps[-1] == 0
    assert (timesteps.diff() < 0).all()


def test_without_the_transform_steps_are_even():
    expected = torch.cat([torch.linspace(1000, 1, 30), torch.zeros(1)])
    assert torch.allclose(schedule(STRAIGHT, 30), expected, atol=1e-3)
    assert torch.equal(schedule(dataclasses.replace(RELEASED, shift=1.0), 30), schedule(STRAIGHT, 30))


def test_the_transform_shifts_by_the_formula_of_the_spec():
    u = schedule(STRAIGHT, 30)[:-1].double() / 1000
    expected = 1000 * 7 * u / (1 + 6 * u)
    assert torch.allclose(schedule(RELEASED, 30)[:-1].double(), expected, atol=1e-3)
    assert (schedule(RELEASED, 30)[1:-1] > schedule(STRAIGHT, 30)[1:-1]).all()  # more steps where it is noisy


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "8", None, True])
def test_impossible_step_counts_are_named(steps):
    with pytest.raises(ValueError, match=f"steps must be a whole number from 1 to 1000, not {steps!r}"):
        schedule(RELEASED, steps)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_euler_is_exact_where_the_velocity_does_not_change(steps):
    noise, data = torch.randn(2, 1, 4, 3, 2, 2).double()
    timesteps = schedule(RELEASED, steps).double()
    assert torch.allclose(sample(lambda z, t: noise - data, noise, timesteps), data, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_euler_is_exact_where_the_data_is_known_from_every_point_of_the_way(steps):
    """The velocity that a perfect network has for one picture: z = (1 - u) data + u noise, so v = (z - data) / u."""
    noise, data = torch.randn(2, 1, 4, 3, 2, 2).double()
    seen = []

    def velocity(z, t):
        seen.append(float(t))
        assert torch.allclose(z, data + t / 1000 * (noise - data), atol=1e-9)
        return (z - data) * 1000 / t

    timesteps = schedule(RELEASED, steps).double()
    assert torch.allclose(sample(velocity, noise, timesteps), data, atol=1e-9)
    assert seen == timesteps[:-1].tolist()


def test_noise_is_unchanged_and_every_step_is_yielded():
    noise, calls = torch.ones(1, 2), []
    steps = sample_steps(lambda z, t: calls.append(t) or z, noise, schedule(RELEASED, 5))
    found = [(len(calls), z) for z in steps]
    assert torch.equal(noise, torch.ones(1, 2)) and [count for count, _ in found] == [1, 2, 3, 4, 5]
    assert torch.equal(found[-1][1], sample(lambda z, t: z, noise, schedule(RELEASED, 5)))


def test_guidance_goes_from_the_negative_through_the_positive():
    positive, negative = torch.randn(2, 1, 4, 3, 2, 2).double()
    assert torch.allclose(guide(positive, negative, 1), positive, atol=1e-15)
    assert torch.equal(guide(positive, negative, 0), negative)
    assert torch.allclose(guide(positive, negative, 5), positive + 4 * (positive - negative), atol=1e-12)
    assert torch.equal(guide(positive, positive, 5), positive)


@pytest.mark.parametrize("apart, kept", [(0.1, 0.25), (0.2, 1.0), (2.0, 1.0)])
def test_latents_settle_where_they_are_near_the_first_guess(apart, kept):
    """Everywhere 0.1 apart, 0.01 squared, a quarter of the bound of 0.04: a quarter of the difference is kept."""
    guess = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(settle(guess + apart, guess, 0.04), guess + kept * apart)


def test_where_latents_are_uncertain_they_stay_what_was_sampled():
    """A part of the picture apart by far: there, and at its edge, nothing is pulled; far from it all is."""
    guess = torch.zeros(1, 3, 4, 8, 8)
    sampled = guess + 0.01
    sampled[..., :3] = 2.0
    settled = settle(sampled, guess, 0.05)
    assert torch.equal(settled[..., :3], sampled[..., :3])
    assert (settled[..., 5:].abs() < 1e-4).all()


def test_noise_without_a_mean_is_pulled_further_than_what_leans_one_way():
    """What averages out over neighbours is the sampling's own; a shift of the same size is another picture."""
    guess = torch.zeros(1, 3, 8, 12, 16)
    noise = 0.2 * torch.randn(guess.shape, generator=torch.Generator().manual_seed(0))
    assert settle(noise, guess, 0.04).square().mean() < 0.05 * noise.square().mean()
    shifted = guess + 0.21
    assert torch.equal(settle(shifted, guess, 0.04), shifted)


def test_only_the_last_step_settles_and_one_step_has_nothing_to():
    data, noise = 0.1 * torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 4, 5, 6)

    def velocity(z, t):  # it changes its mind after the first step
        return (z - data - 0.1 * (t < MAX_TIMESTEP)) / (t / MAX_TIMESTEP)

    timesteps = schedule(SamplerConfig(), 4, end_at_zero=True)
    free, settled = (list(sample_steps(velocity, noise, timesteps, settled=bound)) for bound in (0.0, 0.02))
    assert all(torch.equal(*steps) for steps in zip(free[:-1], settled[:-1], strict=True))
    torch.testing.assert_close(free[-1], data + 0.1)
    torch.testing.assert_close(settled[-1], data + 0.05)
    once = [sample(velocity, noise, timesteps[[0, -1]], settled=bound) for bound in (0.0, 0.02)]
    assert torch.equal(*once)


def test_the_first_steps_are_guided_by_the_memory():
    """Down to 850 of 1000: the velocity and once and a half its difference from the forgetful one; alone after that."""
    noise = torch.randn(1, 3, 2, 4, 4)
    timesteps = torch.tensor([1000.0, 900.0, 850.0, 400.0, 0.0])
    made = sample(lambda z, t: 2 + 0 * z, noise, timesteps, forgetful=lambda z, t: 1 + 0 * z, guidance=1.5)
    torch.testing.assert_close(made, noise - 0.6 * (2 + 1.5) - 0.4 * 2)


def test_what_latents_settle_on_is_not_guided():
    data, noise = 0.1 * torch.randn(1, 3, 4, 5, 6), torch.randn(1, 3, 4, 5, 6)

    def towards(goal):
        return lambda z, t: (z - goal) / (t / MAX_TIMESTEP)

    made = sample(
        towards(data), noise, torch.tensor([1000.0, 0.0]), forgetful=towards(data - 0.1), guidance=1.0, settled=0.02
    )
    torch.testing.assert_close(made, data + 0.05)  # half of the way to data + 0.1, since 0.01 is half of 0.02
