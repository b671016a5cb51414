"""The world model trains on walks as inference has them, starts with a memory of key frames, and a run goes on."""

import json
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import SMALL_MODEL
from PIL import Image
from torch import nn

import infworld
from infworld.checkpoint import read_tensors, save_tensors
from infworld.config import ModelConfig, RolloutConfig, SamplerConfig, from_dict, load_config
from infworld.live import REFRESH
from infworld.memory import MemoryCompressor
from infworld.sampler import MAX_TIMESTEP
from infworld.text import ByteTextEncoder
from infworld.training import check_gradients, train_world
from infworld.training.data import Cut, WalkPool, fade, first_seed
from infworld.training.frames import to_video
from infworld.training.optim import EMA, GradientClipper
from infworld.training.pictures import Pictures, make_atlas
from infworld.training.render import render
from infworld.training.train_world import (
    FIRST_CHUNK,
    NO_PROMPT,
    NOISES,
    Trainee,
    averaged,
    drop_prompts,
    flow_loss,
    initialize_compressor,
    make_optimizers,
    memory_errors,
    paint,
    pick_chunk,
    pick_cut,
    resume,
)
from infworld.training.walks import MIXED
from infworld.training.worlds import TRAIN_SEEDS, captions, make_worlds, spawn, walk
from infworld.vae import build_vae

CHUNK = 8  # frames, so that a test takes seconds
SETTINGS = SMALL_MODEL | {
    "model_cfg": SMALL_MODEL["model_cfg"] | {"memory_hidden_dim": 64},
    "validation_data": {"num_frames": CHUNK + 1},
    "buckets": [[16, 32]],
}
CONFIG = from_dict(ModelConfig, SETTINGS, "SETTINGS")
SHORT_SETTINGS = SETTINGS | {"validation_data": {"num_frames": CHUNK + 1, "chunk_lengths": [4, CHUNK]}}
SHORT_CONFIG = from_dict(ModelConfig, SHORT_SETTINGS, "SHORT_SETTINGS")
LATE = Cut(place=1, new=1, recent=1)  # the second half of a chunk, whose first half came since the last refreshment
WALKS, CHUNKS = 3, 2


def make_pool(config: ModelConfig = CONFIG) -> WalkPool:
    """Walks of two chunks in worlds 0, 1 and 2, through a VAE that has learned nothing; every frame does something
    else, so that a frame's action cannot be mistaken for its neighbour's."""

    def restless(_, count, frames, generator):
        return torch.randint(1, 9, (2, count, frames), generator=generator).unbind(0)

    torch.manual_seed(0)
    pool = WalkPool(
        build_vae(config.vae_cfg),
        ByteTextEncoder(config.text_encoder_cfg),
        config,
        size=WALKS,
        chunks=CHUNKS,
        mixture=MIXED,
        first_seed=0,
        device=torch.device("cpu"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("infworld.training.data.sample_actions", restless)
        pool.renew(WALKS)
    return pool


@pytest.fixture(scope="module")
def pool() -> WalkPool:
    return make_pool()


@pytest.fixture(scope="module")
def short_pool() -> WalkPool:
    return make_pool(SHORT_CONFIG)


@pytest.fixture
def model() -> Trainee:
    torch.manual_seed(0)
    return Trainee(CONFIG)


# --- the data


def test_batches_have_the_shapes_of_inference(pool):
    for chunk in range(CHUNKS):
        batch = pool.batch(chunk, 4)
        assert batch.history.shape == (4, 16, 1 + 2 * chunk, 2, 4)
        assert batch.target.shape == (4, 16, 3, 2, 4)
        assert batch.move.shape == batch.view.shape == (4, CHUNK + 1)
        assert batch.ids.shape == batch.mask.shape == (4, SETTINGS["text_encoder_cfg"]["model_max_length"])
        assert batch.history.dtype == batch.target.dtype == torch.float32


@torch.no_grad()
def test_history_target_and_actions_are_of_one_walk(pool):
    """The target begins with the last frame of the history and follows from there by the batch's own actions."""
    batch = pool.select(torch.arange(WALKS), torch.zeros(WALKS, dtype=torch.long), 1)
    worlds = make_worlds(range(WALKS))
    so_far = walk(worlds, spawn(worlds), *pool.actions[:, :, :CHUNK].unbind(1))
    on = walk(worlds, so_far[:, -1], batch.move[:, :-1], batch.view[:, :-1])
    for poses, latents in ((so_far, batch.history), (on, batch.target)):
        video = to_video(render(worlds, poses, 16, 32))
        torch.testing.assert_close(pool.vae.encode(video)[0], latents, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cut", [LATE, Cut(place=1, new=1), Cut(place=0, new=1)])
def test_short_chunks_are_of_one_walk_too(short_pool, cut):
    """History, target and actions of a chunk that begins later; the action after it is taken to be its last."""
    pool, frames = short_pool, 4 * cut.place
    batch = pool.select(torch.arange(WALKS), torch.zeros(WALKS, dtype=torch.long), 1, cut)
    assert batch.history.shape[2] == 3 + cut.place and batch.target.shape[2] == 2 and batch.recent == cut.recent
    worlds = make_worlds(range(WALKS))
    so_far = walk(worlds, spawn(worlds), *pool.actions[:, :, : CHUNK + frames].unbind(1))
    on = walk(worlds, so_far[:, -1], batch.move[:, :-1], batch.view[:, :-1])
    assert on.shape[1] == 5
    for poses, latents in ((so_far, batch.history), (on, batch.target)):
        video = to_video(render(worlds, poses, 16, 32))
        torch.testing.assert_close(pool.vae.encode(video)[0], latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(batch.move[:, -1], batch.move[:, -2]) and torch.equal(batch.view[:, -1], batch.view[:, -2])


def test_short_chunks_that_come_back_are_drawn_more_often(short_pool, monkeypatch):
    """What the first half of the chunk saw counts as seen for its second half."""
    returns = torch.full((WALKS, CHUNKS * CHUNK), -1)
    returns[0, CHUNK + 4 :] = CHUNK + 2
    returns[1, CHUNK : CHUNK + 4] = 0
    returns[2, CHUNK + 4 : CHUNK + 6] = 0
    monkeypatch.setattr(short_pool, "returns", returns)
    assert short_pool.needs(1, LATE).tolist() == [[1.0], [0.0], [0.5]]
    assert short_pool.needs(1, Cut(0, 1)).tolist() == [[0.0], [1.0], [0.0]]


def test_chunks_of_all_lengths_are_drawn_and_their_memories_are_of_few_lengths():
    """As live play has them, and for the compressor two lengths for each chunk that fits in one pass."""
    config, rng = load_config("tiny"), random.Random(0)
    cuts = Counter(pick_cut(config, rng) for _ in range(6000))
    lengths = Counter({new: sum(n for cut, n in cuts.items() if (cut.new if cut else 20) == new) for new in (4, 8, 20)})
    assert {new: count / 6000 for new, count in lengths.items()} == pytest.approx({4: 0.25, 8: 0.25, 20: 0.5}, abs=0.03)
    short = [cut for cut in cuts if cut]
    assert {(cut.new, cut.place) for cut in short} == {
        (4, 0),
        (4, 4),
        (4, 8),
        (4, 12),
        (4, 16),
        (8, 0),
        (8, 8),
        (8, 16),
    }
    assert all(cut.recent in (0, cut.place) and cut.recent % cut.new == 0 for cut in short)
    assert max(cut.recent for cut in short) == REFRESH
    assert {cut.place - cut.recent for cut in short} == {0, 8}
    assert pick_cut(CONFIG, rng) is None


def test_a_history_may_begin_inside_a_walk(pool):
    """It begins with a fresh encoding of the chunk it begins with; its chunk and actions are those that follow."""
    index, start = torch.tensor([2, 0]), torch.tensor([1, 0])
    batch = pool.select(index, start, 0)
    for row, (walk_, chunk) in enumerate(zip(index, start, strict=True)):
        torch.testing.assert_close(
            batch.history[row], pool.targets[walk_, chunk, :1].movedim(0, 1), atol=1e-4, rtol=1e-4
        )
        assert torch.equal(batch.target[row], pool.targets[walk_, chunk].movedim(0, 1))
        assert torch.equal(batch.move[row], pool.actions[walk_, 0, chunk * CHUNK : (chunk + 1) * CHUNK + 1])
    starts = {tuple(begun.tolist()) for begun in pool.batch(0, 64).history[:, 0, 0, 0]}
    assert len(starts) == WALKS * CHUNKS  # every chunk of every walk is met


def test_with_pictures_kinds_take_turns_and_only_toys_have_captions(monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (32, 64, 3), dtype=np.uint8))
    pictures = Pictures(*(make_atlas([image], (16, 32)) for _ in range(3)))
    pool = WalkPool(
        build_vae(CONFIG.vae_cfg),
        ByteTextEncoder(CONFIG.text_encoder_cfg),
        CONFIG,
        size=3,
        chunks=1,
        mixture=MIXED,
        first_seed=0,
        device=torch.device("cpu"),
        pictures=pictures,
    )
    monkeypatch.setattr(pool, "kinds", ("pictures", "textured", "toy"))
    for _ in pool.kinds:
        pool.renew(1)
    words = pool.tokens[:, 1].sum(1)
    assert words[0] == words[1] == 1 < words[2]  # the start token alone, but for the toy world
    assert torch.pdist(pool.targets.flatten(1)).min() > 1e-2


def test_histories_are_made_a_few_walks_at_a_time(monkeypatch):
    pool, painted = make_pool(), []
    monkeypatch.setattr(pool, "at_once", 2)
    whole = pool.history.clone()
    pool.next_seed, pool.oldest = 0, 0
    with monkeypatch.context() as patch:
        again = torch.stack([pool.actions[:, 0], pool.actions[:, 1]])
        patch.setattr("infworld.training.data.sample_actions", lambda *_: again.unbind(0))
        pool.renew(WALKS)
        torch.testing.assert_close(pool.history, whole, atol=1e-4, rtol=1e-4)
        pool.renew(WALKS, lambda batch: painted.append(len(batch.history)) or batch.target)
    assert painted == [2, 2, 1, 1]  # two chunks of two walks, then of the third


def test_chunks_that_come_back_are_drawn_more_often(pool, monkeypatch):
    """A frame needs the memory if it shows again what the history saw, not what the chunk itself saw or what was before
    the history."""
    returns = torch.full((WALKS, CHUNKS, CHUNK), -1)
    returns[0, 1] = 3  # all of chunk 1 of walk 0 shows what frame 3 saw
    returns[1, 1, :2] = 0  # of walk 1 a quarter
    returns[2, 1] = CHUNK + 1  # of walk 2 nothing but its own frames
    monkeypatch.setattr(pool, "returns", returns.flatten(1))
    assert pool.needs(1).tolist() == [[1.0], [0.25], [0.0]]
    assert not pool.needs(0).any()
    torch.manual_seed(0)
    begun = pool.batch(1, 1400).target[:, 0, 0, 0, 0]
    drawn = [(begun == pool.targets[walk, 1, 0, 0, 0, 0]).float().mean().item() for walk in range(WALKS)]
    assert drawn == pytest.approx([5 / 8, 2 / 8, 1 / 8], abs=0.05)


@torch.no_grad()
def test_a_painter_makes_the_histories_and_leaves_the_truth():
    """One that paints the truth itself leaves the histories as they are, but for what the VAE loses."""
    pool, other = make_pool(), make_pool()
    pool.filled = pool.oldest = other.filled = other.oldest = 0
    seen = []

    def truth(batch):
        seen.append(batch.history.shape[2])
        return batch.target

    seeds = [p.next_seed for p in (pool, other)]
    assert seeds[0] == seeds[1]
    pool.renew(WALKS, truth), other.renew(WALKS)
    assert seen == [1, 3]  # each chunk from the history before it
    assert torch.equal(pool.targets, other.targets) and torch.equal(pool.history[:, :1], other.history[:, :1])
    assert not torch.equal(pool.history, other.history)

    film = pool.vae.decode(pool.select(torch.tensor([1]), torch.tensor([0]), 0).target)
    _, state = pool.vae.encode(pool.vae.decode(pool.targets[1:2, 0, :1].movedim(2, 1)))
    painted, _ = pool.vae.encode(film[:, :, 1:], state)
    torch.testing.assert_close(pool.history[1:2, 1:3].movedim(2, 1), painted, atol=1e-4, rtol=1e-4)


def test_actions_can_be_read_off_poses():
    """Labels of noisy poses are mostly what was done; a mixture has both."""
    worlds = make_worlds(range(2))
    done = torch.tensor([[1] * 60, [0] * 30 + [4] * 30])
    poses = walk(worlds, spawn(worlds), done[:1].expand(2, -1), done[1:].expand(2, -1))[0]
    assert train_world.make_labeller("actions", 0) is None
    labels = train_world.make_labeller("poses", 0)(poses, done)
    assert labels.shape == done.shape and (labels == done).float().mean() > 0.8
    assert set(train_world.make_labeller("naive", 0)(poses, done).unique().tolist()) <= set(range(9))
    mixed = train_world.make_labeller("mixed", 0)
    kept = sum(torch.equal(mixed(poses, done), done) for _ in range(60))
    assert 30 < kept < 58


def test_captions_are_those_of_the_worlds(pool):
    ids, mask = pool.text.tokenize(captions(make_worlds(range(WALKS))))
    batch = pool.select(torch.arange(WALKS), torch.zeros(WALKS, dtype=torch.long), 0)
    assert torch.equal(batch.ids, ids) and torch.equal(batch.mask, mask)


def test_new_walks_replace_the_oldest():
    pool = make_pool()
    before = pool.targets.clone()
    pool.renew(1)
    changed = (pool.targets != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, False]
    assert pool.next_seed == WALKS + 1


def test_no_two_runs_or_ranks_train_on_the_same_worlds():
    starts = [first_seed(run, rank, 8) for run in range(10) for rank in range(8)]
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) > 100_000
    assert starts[-1] + 100_000 in TRAIN_SEEDS
    with pytest.raises(ValueError, match="--seed is 10"):
        first_seed(10, 0, 1)


@pytest.mark.parametrize("chunks", [1, 2, 3, 4, 6, 13])
@pytest.mark.parametrize("frames", [9, 81, 321])
def test_every_chunk_of_a_walk_is_trained_and_none_beyond(chunks, frames):
    config = ModelConfig(validation_data=RolloutConfig(num_frames=frames))
    rng = random.Random(0)
    met = Counter(pick_chunk(chunks, config, rng) for _ in range(4000))
    assert set(met) == set(range(chunks))
    assert chunks == 1 or met[0] / 4000 == pytest.approx(FIRST_CHUNK, abs=0.02)


# --- the model


def smooth_latents(frames: int) -> torch.Tensor:
    """Random latents (2, 16, frames, 12, 16) that change gently, every channel with deviation 1."""
    generator = torch.Generator().manual_seed(frames)
    coarse = torch.randn(2, 16, frames // 4 + 2, 4, 5, generator=generator)
    latents = F.interpolate(coarse, (frames, 12, 16), mode="trilinear", align_corners=True)
    return latents / latents.std((0, 2, 3, 4), keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 21, 41, 61])
def test_the_compressor_starts_by_passing_key_frames_on(frames):
    torch.manual_seed(0)
    compressor = MemoryCompressor(16, 64, 2)
    initialize_compressor(compressor)
    latents = smooth_latents(frames)
    compressed = compressor.compress(latents)
    correlation = torch.corrcoef(torch.stack((compressed.flatten(), latents[:, :, ::4].flatten())))[0, 1]
    assert correlation > 0.9


def test_an_untrained_model_does_not_know_whose_memory_it_has(model, pool):
    assert memory_errors(model, pool, 1)["gap"] == 1.0  # its head is silent
    torch.nn.init.normal_(model.transformer.head.head.weight)
    assert memory_errors(model, pool, 1)["gap"] != 1.0


def test_every_noise_of_a_sample_has_its_own_memory(model, pool):
    """Two noises a sample at once give what they give one by one."""
    torch.nn.init.normal_(model.transformer.head.head.weight)
    batch = pool.batch(1, 3)
    noisy, timestep = torch.randn(6, *batch.target.shape[1:]), torch.rand(6) * MAX_TIMESTEP
    with torch.no_grad():
        both = model(noisy, timestep, batch)
        for k in range(2):
            torch.testing.assert_close(both[k::2], model(noisy[k::2], timestep[k::2], batch), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_memory_of_short_chunks_is_a_live_walks(short_pool):
    """Compressed up to the last refreshment, then chunk by chunk: what `KeptMemory` makes of the same latents."""
    torch.manual_seed(0)
    model = Trainee(SHORT_CONFIG)
    torch.nn.init.normal_(model.transformer.head.head.weight)
    batch = short_pool.select(torch.arange(1), torch.zeros(1, dtype=torch.long), 1, Cut(1, 1, 1))
    history, transformer = batch.history, model.transformer
    context = transformer.embed_text(model.text(batch.ids, batch.mask), batch.mask)
    kept = transformer.keep_memory(context, torch.tensor([600.0]), tuple(history.shape[3:]), 8)
    kept.extend(torch.cat([transformer.latent_encoder.compress(history[:, :, :3]), history[:, :, 2:3]], 2))
    kept.extend(history[:, :, 3:])
    noisy = torch.randn_like(batch.target)
    expected = kept.denoise(noisy, 0, transformer.action_encoder(batch.move, batch.view))
    torch.testing.assert_close(model(noisy, torch.tensor([600.0]), batch), expected, atol=1e-4, rtol=1e-4)


def test_all_that_a_live_memory_reads_learns(short_pool):
    torch.manual_seed(0)
    model = Trainee(SHORT_CONFIG)
    torch.nn.init.normal_(model.transformer.head.head.weight)
    batch = short_pool.batch(1, 2, LATE)
    batch.history.requires_grad_()
    flow_loss(model, batch, shift=3.0, frozen=False).backward()
    assert (batch.history.grad.abs().sum((0, 1, 3, 4)) > 0).all()


def test_what_is_painted_stays_near_the_truth(model, pool):
    """A model that knows the truth paints it; one that knows nothing leaves what shows through the noise."""
    torch.manual_seed(0)
    batch = pool.batch(1, 16)
    truth = batch.target

    def exact(z, timestep, *_):
        return (z - truth) / (timestep / MAX_TIMESTEP).view(-1, 1, 1, 1, 1)

    sampler = SamplerConfig(shift=3.0, num_sampling_steps=8)
    painted = paint(model, batch, sampler)  # its head is silent: nothing is taken off the noise
    similar = torch.corrcoef(torch.stack((painted.flatten(), truth.flatten())))[0, 1]
    assert 0 < similar < 0.7
    model.transformer.denoise = exact
    torch.testing.assert_close(paint(model, batch, sampler), truth, atol=1e-3, rtol=1e-3)


def test_the_true_velocity_has_no_loss(pool):
    def perfect(noisy, timestep, batch, frozen):
        return (noisy - batch.target.repeat_interleave(NOISES, 0)) / (timestep / MAX_TIMESTEP).view(-1, 1, 1, 1, 1)

    torch.manual_seed(0)
    assert flow_loss(perfect, pool.batch(1, 16), shift=3.0, frozen=False) < 1e-6
    assert flow_loss(lambda noisy, *_, frozen: 0 * noisy, pool.batch(1, 16), shift=3.0, frozen=False) > 0.5


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_compressor_gets_no_gradient(model, pool, frozen):
    torch.nn.init.normal_(model.transformer.head.head.weight)
    flow_loss(model, pool.batch(1, 2), shift=3.0, frozen=frozen).backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    compressor = {name for name in learns if name.startswith("transformer.latent_encoder")}
    assert bool(compressor) is not frozen
    assert len(learns) > len(compressor)


def test_some_prompts_are_dropped(pool):
    batch = pool.batch(1, 200)
    whole = batch.mask.clone()
    drop_prompts(batch)
    dropped = (batch.mask != whole).any(1)
    assert (batch.mask[dropped].sum(1) == 1).all() and batch.mask[:, 0].all()
    assert dropped.float().mean() == pytest.approx(NO_PROMPT, abs=0.12)


def test_every_parameter_has_one_optimizer(model):
    owned = [p for o in make_optimizers(model, 1e-3) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.parameters()))


def test_bad_steps_are_lost_and_larger_ones_become_usual():
    weights = nn.Parameter(torch.zeros(4))
    clip = GradientClipper()

    def clipped(*gradient: float) -> float:
        weights.grad = torch.tensor(gradient, dtype=torch.float32)
        clip([weights, nn.Parameter(torch.zeros(1))])
        return weights.grad.norm().item()

    assert clipped(torch.nan, 1, 1, 1) == 0  # though nothing is usual yet
    assert clipped(3, 4, 0, 0) == pytest.approx(1) and clipped(0.3, 0.4, 0, 0) == pytest.approx(0.5)
    assert clipped(0, torch.inf, 0, 0) == clipped(5e4, 0, 0, 0) == 0
    assert clipped(0, 6, 0, 0) == pytest.approx(1) and clip.lost == 3
    kept = [clipped(0, 100, 0, 0) > 0 for _ in range(40)]
    assert not kept[0] and all(kept[20:]) and kept == sorted(kept)


def test_averaged_weights_are_lent(model):
    ema = EMA(model, 0.9)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in ema.average.values():
        tensor += 1
    with averaged(model, ema):
        assert all(torch.equal(tensor, ema.average[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def test_films_fade_along_the_way():
    """From the first frame, which stays, to the last: less contrast and less detail, the mean colour as it was."""
    picture = 2 * torch.rand(3, 3, 1, 24, 32, generator=torch.Generator().manual_seed(0)) - 1
    video = picture.expand(-1, -1, 12, -1, -1)
    assert torch.equal(fade(video, 0.0), video)
    faded = fade(video, 1.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(faded[:, :, 0], video[:, :, 0])
    torch.testing.assert_close(faded.mean((3, 4)), video.mean((3, 4)), atol=0.02, rtol=0)
    spread = faded.std((1, 3, 4)) / video.std((1, 3, 4))
    assert (spread.diff(dim=1) < 1e-6).all() and (spread[:, -1] < 0.6).all()
    some = fade(video.repeat(20, 1, 1, 1, 1), 0.25, torch.Generator().manual_seed(0)) != video.repeat(20, 1, 1, 1, 1)
    assert 0.05 < some.flatten(1).any(1).float().mean() < 0.45


# --- a run


STEPS, BATCH = 3, 2


def train(folder, vae, *more: str) -> list[dict]:
    """A run of three steps, whatever the clock says; returns its log's lines."""
    (folder / "small.yaml").write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    sizes = ["--batch", str(BATCH), "--walks", "2", "--chunks", str(CHUNKS), "--report-every", "0"]
    command = ["--config", str(folder / "small.yaml"), "--vae", str(vae), "--out", str(folder), "--minutes", "60"]
    progress = iter([*torch.linspace(0, 0.9, STEPS).tolist(), 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_world, "from_rank_0", lambda *_: (next(progress), 1.0))
        train_world.train(train_world.parse_args([*command, *sizes, *more]))
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run, the VAE's weights beside the others."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    save_tensors(folder / "vae.safetensors", build_vae(CONFIG.vae_cfg).state_dict())
    train(folder, folder / "vae.safetensors")
    return folder


def test_the_engine_films_with_what_a_run_writes(run):
    world = infworld.load(run / "small.yaml", device="cpu")  # strict
    session = world.start(np.zeros((16, 32, 3), np.uint8), f"right {CHUNK}", "a red house")
    frames = [chunk.frames for chunk in world.extend(session, CHUNKS)]
    assert np.concatenate(frames).shape == (1 + CHUNKS * CHUNK, 16, 32, 3)


def test_a_run_logs_its_losses_and_its_memory(run):
    lines = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    reports = [line for line in lines if line["event"] == "report"]
    assert [report["step"] for report in reports] == [1, 2, 3, 3]
    assert reports[-1]["samples"] == STEPS * BATCH
    assert all({"error_right", "error_wrong", "gap", "loss"} <= set(report) for report in reports)
    assert (run / "train.png").stat().st_size > 0


def test_what_is_written_for_use_are_the_averaged_weights(run):
    average = torch.load(run / "state.pt", weights_only=True)["ema"]
    for part, name in (("transformer", "world.safetensors"), ("text", "text.safetensors")):
        weights = read_tensors(run / name)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        assert all(torch.equal(tensor, average[f"{part}.{key}"].half()) for key, tensor in weights.items())


def test_a_run_goes_on_where_another_stopped(run, tmp_path):
    more = ["--resume", str(run / "state.pt"), "--paint", "0", "--labels", "mixed"]
    lines = train(tmp_path, run / "vae.safetensors", *more)
    assert lines[0]["event"] == "ready" and lines[0]["step"] == STEPS
    assert lines[-1]["step"] == 2 * STEPS and lines[-1]["samples"] == 2 * STEPS * BATCH


PROGRAM = """
from infworld.training import train_world
progress, share = iter([0.0, 0.5, 0.9, 1.0]), train_world.from_rank_0
train_world.from_rank_0 = lambda ranks, *_: share(ranks, next(progress), 1.0)
train_world.main()
"""


@pytest.mark.skipif(os.name == "nt", reason="torchrun's signals are POSIX")
def test_two_processes_train_on_short_chunks_and_go_on(run, tmp_path):
    """Three steps each: a run, one that takes up its state, and one that begins with its weights."""
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(SHORT_SETTINGS), encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, tmp_path / "program.py", "--config", tmp_path / "short.yaml", "--vae", run / "vae.safetensors"]
    command += ["--batch", "2", "--walks", "2", "--chunks", "2", "--minutes", "60", "--report-every", "0"]
    weights = tmp_path / "first" / "world.safetensors"
    runs = {
        "first": [],
        "second": ["--resume", tmp_path / "first" / "state.pt", "--paint", "0"],
        "third": ["--resume", weights],
    }
    ready, reports = {}, {}
    for name, more in runs.items():
        done = subprocess.run([*command, "--out", tmp_path / name, *more], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        ready[name], reports[name] = lines[0], [line for line in lines if line["event"] == "report"]
    assert [(line["ranks"], line["step"]) for line in ready.values()] == [(2, 0), (2, STEPS), (2, 0)]
    assert [lines[-1]["step"] for lines in reports.values()] == [STEPS, 2 * STEPS, STEPS]
    assert all({"gap", "short_gap", "loss"} <= line.keys() for lines in reports.values() for line in lines)


def test_a_state_is_taken_up_whole(run, model):
    optimizers, ema = make_optimizers(model, 1e-3), EMA(model, 0.9)
    assert resume(run / "state.pt", model, optimizers, ema) == {"step": STEPS, "samples": STEPS * BATCH}
    state = torch.load(run / "state.pt", weights_only=True)
    assert all(torch.equal(tensor, state["model"][name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, state["ema"][name]) for name, tensor in ema.average.items())
    assert all(optimizer.state_dict()["state"] for optimizer in optimizers)


def test_weights_alone_begin_a_new_count(run, model):
    ema = EMA(model, 0.9)
    assert resume(run / "world.safetensors", model, make_optimizers(model, 1e-3), ema) == {"step": 0, "samples": 0}
    weights = read_tensors(run / "world.safetensors")
    assert all(torch.equal(tensor, weights[name].float()) for name, tensor in model.transformer.state_dict().items())
    assert all(torch.equal(tensor, ema.average[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.transformer.head.head.bias += 1
    ema.update()  # what a run begins with may be far from where it goes, and is soon forgotten
    moved = ema.average["transformer.head.head.bias"] - weights["head.head.bias"].float()
    assert (moved > 0.5).all()


def test_right_gradients_are_found_right_and_wrong_ones_wrong(run, capsys):
    arguments = ["--config", str(run / "small.yaml"), "--vae", str(run / "vae.safetensors"), "--chunks", str(CHUNKS)]
    arguments += ["--resume", str(run / "world.safetensors"), "--steps", "2", "--batch", "2"]
    assert check_gradients.check(check_gradients.parse_args(arguments)) == 0
    assert "fine: the worst gradient is off by 0.000" in capsys.readouterr().out

    right = {"a": torch.ones(4), "b": torch.full((4,), 1e-9)}
    off = check_gradients.most_deviating
    assert off(right, right)[0] == 0
    assert off({"a": torch.full((4,), 1.2), "b": -right["b"]}, right) == (pytest.approx(0.2), "a")  # b is next to none
    assert off({"a": torch.full((4,), torch.nan), "b": right["b"]}, right) == (torch.inf, "a")
    assert off({"a": right["a"]}, right) == (torch.inf, "b")


def test_a_run_with_wrong_gradients_is_not_called_fine(run, monkeypatch):
    steps, gradients = iter(range(9)), check_gradients.gradients

    def sometimes_wrong(*arguments):
        found = gradients(*arguments)
        return {name: 3 * gradient for name, gradient in found.items()} if next(steps) == 2 else found

    monkeypatch.setattr(check_gradients, "gradients", sometimes_wrong)
    arguments = ["--config", str(run / "small.yaml"), "--vae", str(run / "vae.safetensors"), "--chunks", str(CHUNKS)]
    assert check_gradients.check(check_gradients.parse_args([*arguments, "--steps", "2", "--batch", "2"])) == 1
