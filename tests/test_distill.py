"""Distillation: who plays which role, what each stage teaches, and a run that goes on as if it had not stopped."""

import dataclasses
import json

import pytest
import torch
from test_finetune import CHUNK, LATENTS, small  # noqa: F401 (a fixture)

import infworld
from infworld.checkpoint import load_strict, read_tensors
from infworld.cli import distill as command
from infworld.cli.finetune import embed_captions, load_transformer
from infworld.sampler import sample, schedule
from infworld.training.clips import ClipSampler
from infworld.training.distill import ROLES, Distillation, Settings, few_step_sampler
from infworld.vae import build_vae
from infworld.video import read_mp4
from infworld.videos.dataset import open_data

FAST = Settings(few=2, rank=4, consistency=2, matching=2, batch=2, lr=1e-3, matching_lr=1e-3)


def make(small, settings: Settings = FAST) -> Distillation:  # noqa: F811
    config, data = small
    scheduler = dataclasses.replace(config.val_scheduler_cfg, text_cfg_scale=settings.guidance)
    config = dataclasses.replace(config, val_scheduler_cfg=scheduler, negative_prompt="blur")
    clips, device = open_data(data, config), torch.device("cpu")
    sampler = ClipSampler(clips, embed_captions(config, clips, device), scheduler.shift, 4, settings.seed)
    path = config.path(config.vae_cfg.vae_pth)
    vae = load_strict(lambda: build_vae(config.vae_cfg), read_tensors(path), where=path)
    return Distillation(load_transformer(config, device), vae.requires_grad_(False), sampler, config, settings)


def values(training: Distillation) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in training.transformer.state_dict().items()}


def changed(training: Distillation, before: dict[str, torch.Tensor]) -> set[str]:
    """Which roles' weights differ; "" for those of the transformer itself."""
    names = {
        name for name, tensor in training.transformer.state_dict().items() if not torch.equal(tensor, before[name])
    }
    return {next((role for role in ROLES if f".{role}." in name), "") for name in names}


def test_all_roles_begin_as_the_teacher_and_part_only_for_their_own_learning(small):  # noqa: F811
    training = make(small)
    batch = training.sampler.batch(training.sampler.places(1, 1), 1)
    timestep = torch.tensor([600.0])

    def velocities():
        with torch.no_grad():
            return {role: training._velocity(role, batch)(batch.noise, timestep) for role in (None, *ROLES)}

    first = velocities()
    assert all(torch.equal(velocity, first[None]) for velocity in first.values())
    before = values(training)
    training.step()
    assert changed(training, before) == {"student", "average"}
    training.step_number, before = FAST.consistency + 1, values(training)  # of matching, one that is the critic's alone
    training.step()
    assert changed(training, before) == {"critic"}
    later = velocities()
    assert torch.equal(later[None], first[None])
    apart = [float((later[a] - later[b]).abs().max()) for a, b in (("student", None), ("critic", None))]
    assert min(apart) > 0


def test_consistency_brings_few_steps_near_the_teachers_many(small):  # noqa: F811
    """And its guidance, which is folded in: from the same noise the student's 2 steps come nearer to 12 guided ones of
    the teacher than 2 steps without guidance did before."""
    settings = dataclasses.replace(FAST, guidance=20.0, consistency=20, lr=1e-2, rank=16, ema=0.8)
    training = make(small, settings)
    training.transformer.head.head.weight.data *= 4  # so that its path is not straight
    batch = training.sampler.batch(training.sampler.measured(2), 0)
    many = schedule(dataclasses.replace(training.config.val_scheduler_cfg, end_at_zero=True), 12)

    @torch.no_grad()
    def error(truth: torch.Tensor) -> float:
        made = sample(training._velocity("average", batch), batch.noise, training.few)
        return (made - truth).square().mean().item()

    with torch.no_grad():
        truth = sample(training._teacher(batch), batch.noise, many)
    before = error(truth)
    for _ in range(settings.consistency):
        training.step()
    assert error(truth) < 0.8 * before


def test_no_difference_between_critic_and_teacher_moves_nobody(small):  # noqa: F811
    """As at the beginning, without guidance. With guidance, the student is moved from the first step on."""
    for guidance, moves in ((1.0, False), (4.0, True)):
        training = make(small, dataclasses.replace(FAST, guidance=guidance))
        film = training._film(training.sampler.places(3, 1)[0], 0)
        loss = training._match(film)
        moved = max(float(p.grad.abs().max()) for n, p in training.parameters["student"].items() if p.grad is not None)
        assert (moved > 1e-6) is moves and (loss > 1e-8) is moves


def test_films_are_the_students_own_chunk_by_chunk(small):  # noqa: F811
    training = make(small, dataclasses.replace(FAST, rolled=2))
    place = next(p for step in range(50) for p in training.sampler.places(step, 1) if p.chunks == 3)
    film = training._film(place, 0)
    assert film.batch.history.shape[2] == 1 + 2 * LATENTS
    frames = slice((place.start + 3) * CHUNK, (place.start + 4) * CHUNK + 1)
    assert torch.equal(torch.stack([film.batch.move[0], film.batch.view[0]]), place.clip.actions[:, frames])
    start = place.clip.read("targets")[place.start + 1, 0].float()
    redrawn, _ = training.vae.encode(training.vae.decode(start[None, :, None]))
    torch.testing.assert_close(film.batch.history[:, :, :1], redrawn, atol=1e-4, rtol=1e-4)
    again, other = training._film(place, 0), training._film(place, 1)
    assert torch.equal(again.clean, film.clean) and not torch.equal(other.clean, film.clean)


def options(small, out, *more) -> list[str]:  # noqa: F811
    config, data = small
    given = {"model": config.source, "data": data, "out": out, "few": 2, "rank": 4, "batch": 2, "every": 2}
    given |= {"consistency": 2, "matching": 2, "guidance": 3}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    return [str(word) for word in [*words, *more]]


def test_a_distilled_model_films_with_few_steps(small, tmp_path, capsys):  # noqa: F811
    assert command.main(options(small, tmp_path / "fast")) == 0
    world = infworld.load(tmp_path / "fast/model.yaml", "cpu")
    sampler = world.config.val_scheduler_cfg
    assert (sampler.num_sampling_steps, sampler.text_cfg_scale, sampler.end_at_zero) == (2, 1.0, True)
    assert sampler == few_step_sampler(small[0].val_scheduler_cfg, 2)
    assert schedule(sampler, 2).tolist() == pytest.approx([1000, 750, 0])
    assert read_mp4(tmp_path / "fast/films/step-000004.mp4").shape[0] == 1 + 2 * CHUNK
    lines = [json.loads(line) for line in (tmp_path / "fast/train.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert [set(line) & {"loss", "critic"} for line in steps] == [{"loss"}, {"loss"}, {"loss", "critic"}, {"critic"}]


def test_interrupted_and_resumed_is_uninterrupted(small):  # noqa: F811
    """In both stages, and where one stops in the middle of the other."""
    whole = make(small)
    losses = [whole.step() for _ in range(4)]
    for stop in (1, 3):
        begun, resumed = make(small), make(small)
        found = [begun.step() for _ in range(stop)]
        resumed.load_state(begun.state())
        found += [resumed.step() for _ in range(4 - stop)]
        assert found == losses
        ends = [training.state()["average"] for training in (whole, resumed)]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_settings_are_checked(small, tmp_path, capsys):  # noqa: F811
    for wrong in ({"few": 0}, {"matching": -1}, {"ema": 1.0}):
        with pytest.raises(ValueError):
            Settings(**wrong)
    with pytest.raises(ValueError, match="begun with rank 4 and not 8"):
        make(small, dataclasses.replace(FAST, rank=8)).load_state(make(small).state())
