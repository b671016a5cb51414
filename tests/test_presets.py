"""Fewer passes through the transformer: the solver's order, guidance now and then, and sessions that remember it."""

import json

import pytest
import torch
from conftest import with_sampler

from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.config import SamplerConfig, load_config
from infworld.presets import EXACT, PRESETS, Preset, find_preset
from infworld.sampler import guide, guided, sample, schedule
from infworld.session import Session

FASTER = [name for name in PRESETS if name != EXACT.name]


@pytest.fixture(scope="module")
def begun(world, picture) -> Session:
    return world.start(picture, "forward 80", "a meadow", steps=5, guidance=3.0, negative_prompt="blur")


# ------------------------------------------------------------------------------------------------------------ solver


def error(order: int, steps: int) -> float:
    """Of z' = -cos(3 u) z from 1 down to 0, whose solution is known, on uneven steps."""
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    timesteps = 1000 * 2 * u / (1 + u)
    z = sample(lambda z, t: -z * torch.cos(3 * t / 1000), torch.ones(1, dtype=torch.float64), timesteps, order=order)
    return abs(float(z - torch.exp(torch.sin(torch.tensor(3.0, dtype=torch.float64)) / 3)))


@pytest.mark.parametrize("order", [1, 2])
def test_the_error_falls_with_the_power_of_the_step_that_the_order_names(order):
    coarse, middle, fine = (error(order, steps) for steps in (40, 80, 160))
    assert coarse / middle == pytest.approx(2**order, rel=0.15)
    assert middle / fine == pytest.approx(2**order, rel=0.1)


def test_the_second_order_is_exact_where_the_velocity_changes_evenly():
    noise, timesteps = torch.zeros(1).double(), torch.tensor([1000, 999.999, 700, 100, 0], dtype=torch.float64)
    z = sample(lambda z, t: t.reshape(1) / 1000, noise, timesteps, order=2)
    assert float(z) == pytest.approx(-0.5, abs=1e-9)
    assert float(sample(lambda z, t: t.reshape(1) / 1000, noise, timesteps)) < -0.6


def test_one_step_is_eulers_whatever_the_order():
    noise, timesteps = torch.randn(1, 4), torch.tensor([1000.0, 0.0])
    velocity = lambda z, t: z.sin()  # noqa: E731
    assert torch.equal(sample(velocity, noise, timesteps, order=2), sample(velocity, noise, timesteps))


@pytest.mark.parametrize("steps", [1, 2, 8, 1000])
def test_even_steps_end_at_0_without_a_step_over_next_to_nothing(steps):
    u = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    timesteps = schedule(SamplerConfig(shift=7.0), steps, end_at_zero=True)
    torch.testing.assert_close(timesteps.double(), 1000 * 7 * u / (1 + 6 * u), rtol=1e-6, atol=1e-4)
    assert timesteps[0] == 1000 and timesteps[-1] == 0 and timesteps.dtype == torch.float32


def test_any_order_takes_one_velocity_a_step():
    for order in (1, 2):
        asked = []
        sample(
            lambda z, t, asked=asked: asked.append(float(t)) or z, torch.ones(1), torch.arange(7, -1, -1.0), order=order
        )
        assert asked == [7, 6, 5, 4, 3, 2, 1]


def test_an_unknown_order_is_named():
    with pytest.raises(ValueError, match="order must be 1 or 2, not 3"):
        sample(lambda z, t: z, torch.ones(1), torch.tensor([1000.0, 0.0]), order=3)


# ---------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_the_negative_prompt_is_asked_at_every_nth_step_and_its_difference_kept_between(every):
    positive = [torch.randn(4) for _ in range(7)]
    negative = [torch.randn(4) for _ in range(7)]
    asked = []
    velocity = guided(lambda z, t: positive[int(t)], lambda z, t: asked.append(int(t)) or negative[int(t)], 5.0, every)
    found = [velocity(torch.zeros(4), torch.tensor(float(step))) for step in range(7)]
    assert asked == list(range(0, 7, every))
    for step, v in enumerate(found):
        last = step - step % every
        if last == step:
            assert torch.equal(v, guide(positive[step], negative[step], 5.0))
        else:
            torch.testing.assert_close(v, positive[step] + 4 * (positive[last] - negative[last]))


def test_a_difference_that_does_not_change_may_be_kept_for_ever():
    one, other = torch.randn(2, 4)
    always, once = (guided(lambda z, t: one + z, lambda z, t: other + z, 3.0, every) for every in (1, 100))
    for _ in range(3):
        z = torch.randn(4)
        torch.testing.assert_close(always(z, torch.ones(())), once(z, torch.ones(())))


# ----------------------------------------------------------------------------------------------------------- presets


def test_the_presets_do_less_and_less_of_the_work():
    sampler = load_config("infinite-world").val_scheduler_cfg
    passes = [
        preset.passes(sampler, preset.sampler_steps(sampler), sampler.text_cfg_scale) for preset in PRESETS.values()
    ]
    assert passes[0] == 2 * sampler.num_sampling_steps and passes == sorted(passes, reverse=True)
    assert passes[0] >= 4.5 * passes[-1]  # what a film ten times as fast as the naive one's needs


@pytest.mark.parametrize("memory_guidance", [0.0, 1.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_passes_are_as_counted(world, begun, preset, memory_guidance, monkeypatch):
    calls, denoise = [], world.transformer.denoise
    monkeypatch.setattr(world.transformer, "denoise", lambda *args: calls.append(1) or denoise(*args))
    own = with_sampler(world, memory_guidance=memory_guidance)
    second = own.next_chunk(begun, frames=8).session
    for guidance in (1.0, 3.0):
        calls.clear()
        session = second.replace_settings(preset=preset, guidance=guidance)
        own.next_chunk(session, frames=8)
        sampler, steps = own.config.val_scheduler_cfg, session.settings.steps
        assert len(calls) == find_preset(preset).passes(sampler, steps, guidance)


def test_memory_does_not_guide_where_there_is_nothing_but_the_picture(world, begun):
    first, guided = (with_sampler(world, memory_guidance=weight).next_chunk(begun, frames=8) for weight in (0.0, 5.0))
    assert torch.equal(first.latents, guided.latents)
    second = (with_sampler(world, memory_guidance=weight).next_chunk(first.session, frames=8) for weight in (0.0, 5.0))
    assert not torch.equal(*(chunk.latents for chunk in second))


def test_exact_is_the_sampler_of_the_spec(world, begun):
    """Written out once more: Euler steps with both texts at each, bit for bit."""
    noise = torch.randn(1, 16, 21, *begun.history.shape[3:])
    texts = [begun.replace_settings(prompt=prompt, guidance=1.0) for prompt in ("a meadow", "blur")]
    positive, negative = (world.velocity(session) for session in texts)
    timesteps, z = schedule(world.config.val_scheduler_cfg, begun.settings.steps), noise
    for t, after in zip(timesteps, timesteps[1:], strict=False):
        v = negative(z, t) + 3.0 * (positive(z, t) - negative(z, t))
        z = z - v * (t - after) / 1000
    assert torch.equal(world.next_chunk(begun, noise=noise).latents, z)


@pytest.mark.parametrize("preset", FASTER)
def test_the_faster_presets_make_nearly_the_same_film(world, picture, preset):
    """Of an untrained model, whose way is smooth: this tells mistakes, not quality."""
    settings = {"guidance": 3.0, "negative_prompt": "blur"}
    exact = world.next_chunk(world.start(picture, steps=16, **settings)).latents
    faster = world.next_chunk(world.start(picture, steps=16, preset=preset, **settings)).latents
    assert not torch.equal(exact, faster)
    assert (exact - faster).norm() < 0.1 * exact.norm()


def test_steps_are_the_presets_unless_given(world, picture):
    for preset in PRESETS.values():
        assert world.start(picture, preset=preset.name).settings.steps == preset.sampler_steps(
            world.config.val_scheduler_cfg
        )
        assert world.start(picture, preset=preset.name, steps=7).settings.steps == 7


def test_steps_are_a_part_of_the_models_own_but_not_too_few():
    preset = Preset("half", steps=1 / 2, min_steps=5)
    for own, steps in ((30, 15), (31, 16), (9, 5), (8, 5), (3, 3), (1, 1)):
        assert preset.sampler_steps(SamplerConfig(num_sampling_steps=own)) == steps


def test_a_model_may_have_a_preset_of_its_own(world, picture):
    """What a film is made with unless another is asked for."""
    own = with_sampler(world, num_sampling_steps=16, preset="balanced")
    sessions = own.start(picture), own.start(picture, steps=7), own.start(picture, preset="exact")
    assert [(s.settings.preset, s.settings.steps) for s in sessions] == [
        ("balanced", 8),
        ("balanced", 7),
        ("exact", 16),
    ]
    assert load_config("tiny").val_scheduler_cfg.preset == "fast"
    assert load_config("infinite-world").val_scheduler_cfg.preset == "exact"


def test_an_unknown_preset_is_named_with_those_there_are(world, picture):
    with pytest.raises(ValueError, match="unknown preset 'turbo': use exact, balanced, fast"):
        world.rollout(picture, preset="turbo")


# ---------------------------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_film_goes_on_alike(world, begun, preset, tmp_path):
    session = begun.replace_settings(preset=preset)
    session.save(tmp_path / "film.safetensors")
    loaded = Session.load(tmp_path / "film.safetensors")
    assert loaded.settings.preset == preset
    assert torch.equal(world.next_chunk(loaded).latents, world.next_chunk(session).latents)


def stored(begun: Session, path, change) -> None:
    """Saves a session and changes the values in its file."""
    begun.save(path)
    metadata = read_metadata(path)
    values = json.loads(metadata["session"])
    change(values)
    save_tensors(path, read_tensors(path), {**metadata, "session": json.dumps(values)})


def test_a_session_file_from_before_there_were_presets_is_exact(begun, tmp_path):
    stored(begun, tmp_path / "film.safetensors", lambda values: values.pop("preset"))
    assert Session.load(tmp_path / "film.safetensors").settings.preset == "exact"


def test_a_session_file_of_an_unknown_preset_is_refused(begun, tmp_path):
    stored(begun, tmp_path / "film.safetensors", lambda values: values.update(preset="turbo"))
    with pytest.raises(ValueError, match="damaged: unknown preset 'turbo'"):
        Session.load(tmp_path / "film.safetensors")
