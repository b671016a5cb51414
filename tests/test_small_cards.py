"""A film on a card that it does not fit on whole: the plan for it, and that no plan changes a number."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from peak import Peak

import infworld
from infworld import memory
from infworld.cli import generate
from infworld.config import TransformerConfig, load_config
from infworld.dit import KEEP, InfiniteWorldTransformer
from infworld.memory import MAX_SINGLE_PASS, WINDOW, MemoryCompressor, window_starts
from infworld.memory_plan import (
    FASTEST,
    GB,
    PLANS,
    ROPES,
    USABLE,
    MemoryEstimate,
    MemoryPlan,
    NotEnoughMemory,
    choose,
    next_smaller_plan,
)
from infworld.offload import StreamedTensors
from infworld.session import Session
from infworld.text import FILM_ROOM, TextEmbedding
from infworld.vae import VideoVAE, build_vae
from infworld.video import read_mp4
from infworld.world import World

HEIGHT, WIDTH = 448, 896

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
    there = [parameter.data_ptr() for parameter in model.parameters()]
    model.offload_blocks()
    assert [parameter.data_ptr() for parameter in model.parameters()] == there
    before, after = transformer.state_dict(), model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_at_most_two_of_what_passes_are_there_at_once():
    tensors = [torch.full((2, 3), float(i)) for i in range(6)]
    passing = StreamedTensors(iter(tensors))
    assert len({tensor.data_ptr() for tensor in passing}) == 2
    for seen, tensor in zip(passing, tensors, strict=True):
        assert torch.equal(seen, tensor)


def test_going_through_may_stop_anywhere_and_start_again():
    passing = StreamedTensors(torch.full((2,), float(i)) for i in range(4))
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


# -------------------------------------------------------------------------------------- the sums of a full-size film


@pytest.fixture(scope="module")
def released() -> tuple[InfiniteWorldTransformer, VideoVAE]:
    """The released model on the meta device, in bfloat16."""
    config = load_config("infinite-world")
    with torch.device("meta"):
        return InfiniteWorldTransformer(config.model_cfg).bfloat16(), build_vae(config.vae_cfg).bfloat16()


@pytest.fixture(scope="module")
def needs(released) -> MemoryEstimate:
    config = dataclasses.replace(load_config("infinite-world"), buckets=((HEIGHT, WIDTH),))
    return MemoryEstimate.of(config, *released)


@pytest.fixture
def peak(monkeypatch) -> Callable[[Callable[[], object]], int]:
    """The most bytes that a function's tensors take, with attention that keeps no scores, as on a GPU."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))

    def measure(run: Callable[[], object]) -> int:
        with torch.inference_mode(), torch.device("meta"), Peak("meta") as counted:
            run()
        return counted.most

    return measure


def of_size(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def is_honest(planned: int, traced: int) -> bool:
    return traced <= planned <= 1.25 * traced


def test_the_sum_for_a_block_is_what_a_block_takes(released, needs, peak):
    transformer, tokens = released[0], 21 * HEIGHT * WIDTH // 256
    rope, modulation = of_size(1, 2 * tokens, 64, 2, dtype=torch.float32), of_size(1, 6, 1536, dtype=torch.float32)
    text, known = (of_size(1, 12, 512, 128),) * 2, of_size(1, tokens, 1536)

    def step(noise: torch.Tensor) -> torch.Tensor:
        return transformer.blocks[0].noisy_step(noise, known, modulation, rope, text)

    assert needs.tokens == known.nbytes
    assert is_honest(needs.step, peak(lambda: step(of_size(1, tokens, 1536))) + ROPES * rope.nbytes)


def test_the_sum_for_the_compressor_is_what_it_takes(released, needs, peak, monkeypatch):
    def ropes(frames, height, width, head_dim, device):
        return of_size(1, len(frames) * height * width, head_dim // 2, 2, dtype=torch.float32)

    monkeypatch.setattr(memory, "rope_3d", ropes)
    compressor = released[0].latent_encoder
    for latents in (MAX_SINGLE_PASS, 241):
        history = of_size(1, 16, latents, HEIGHT // 8, WIDTH // 8)
        assert is_honest(needs.compressor, peak(lambda h=history: compressor(h)))


def test_the_sum_for_the_vae_is_what_a_chunk_takes(released, needs, peak):
    vae = released[1]
    video = lambda frames: of_size(1, 3, frames, HEIGHT, WIDTH, dtype=torch.float32)  # noqa: E731
    latents = of_size(1, 16, 4, HEIGHT // 8, WIDTH // 8, dtype=torch.float32)  # after which nothing new comes
    decoding = peak(lambda: vae.decode(latents))
    with torch.inference_mode():
        _, state = vae.encode(video(1))
    encoding = peak(lambda: vae.encode(video(12), state)) + video(80).nbytes * 3 // 2
    assert is_honest(needs.frames, max(decoding, encoding))


def test_a_smaller_card_gets_a_plan_that_takes_less_and_fits(needs):
    taken = []
    for card in (80, 48, 24, 16, 12, 8, 6):
        taken.append(needs.gpu(choose(needs, card * GB, 32 * GB)))
        assert taken[-1] <= USABLE * card * GB
    assert taken == sorted(taken, reverse=True)
    assert choose(needs, 16 * GB, 32 * GB) == FASTEST
    assert choose(needs, 12 * GB, 32 * GB) == MemoryPlan("gpu", "cpu")
    assert choose(needs, 8 * GB, 32 * GB) == MemoryPlan("cpu", "cpu")


def test_where_nothing_fits_the_leanest_plan_is_tried(needs):
    assert needs.gpu(choose(needs, 1 * GB, 32 * GB)) == min(needs.gpu(plan) for plan in PLANS)


def test_a_plan_leaves_room_in_the_cpus_memory_too(needs):
    assert choose(needs, 12 * GB, 4 * GB) == MemoryPlan("gpu", "recompute")
    assert choose(needs, 8 * GB, 6 * GB) == MemoryPlan("cpu", "recompute")
    assert needs.cpu(FASTEST) == 0
    assert (
        needs.cpu(MemoryPlan("cpu", "recompute")) >= 30 * needs.block
        and needs.cpu(MemoryPlan("gpu", "cpu")) >= 60 * needs.tokens
    )


def test_an_encoder_that_stays_leaves_room_for_a_film_at_full_speed(needs):
    assert needs.gpu(FASTEST) - needs.rest - needs.layers * needs.block <= USABLE * FILM_ROOM


def test_processes_that_film_together_all_compute_the_same(needs):
    assert {choose(needs, card * GB, 0, team=True).streams for card in (24, 12, 8)} == {"gpu", "cpu"}


def test_each_leaner_plan_takes_less_of_the_gpu(needs):
    plans = [FASTEST]
    while (plan := next_smaller_plan(needs, plans[-1], 32 * GB)) is not None:
        plans.append(plan)
    assert plans == [FASTEST, MemoryPlan("gpu", "cpu"), MemoryPlan("cpu", "cpu")]
    assert next_smaller_plan(needs, FASTEST, 2 * GB) == MemoryPlan("gpu", "recompute")


def test_a_plan_says_what_it_is():
    assert str(MemoryPlan("gpu", "cpu")) == "the model on the GPU, memory streams in the CPU's memory"


# ------------------------------------------------------------------------------------------ out of memory after all


class Failing:
    """In place of a World's way to a chunk: out of memory for the first so many times."""

    def __init__(self, world: World, failures: int):
        self.compute, self.left, self.plans = world._compute_chunk, failures, []
        self.world = world

    def __call__(self, *args):
        self.plans.append(self.world.plan)
        if self.left:
            self.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.compute(*args)


@pytest.fixture
def own_world(small_model) -> World:
    return infworld.load(small_model, device="cpu")


def test_a_chunk_that_does_not_fit_is_made_by_a_leaner_plan(own_world, world, picture, monkeypatch):
    failing = Failing(own_world, failures=1)
    monkeypatch.setattr(own_world, "_compute_chunk", failing)
    heard = []
    session = own_world.start(picture, "forward 80", "a walk", seed=3)
    chunk = own_world.next_chunk(session, heard.append)
    expected = world.next_chunk(session)
    assert failing.plans[0] == FASTEST and failing.plans[1] == own_world.plan != FASTEST
    assert torch.equal(chunk.latents, expected.latents) and (chunk.frames == expected.frames).all()
    assert [p.step for p in heard if p.stage == "sample"] == [1, 2]


def test_the_leaner_plan_is_kept_for_the_chunks_that_follow(own_world, picture, monkeypatch):
    failing = Failing(own_world, failures=1)
    monkeypatch.setattr(own_world, "_compute_chunk", failing)
    made = list(own_world.rollout(picture, num_frames=161))
    assert len(made) == 2 and len(failing.plans) == 3 and failing.plans[1] == failing.plans[2]


def test_a_chunk_that_never_fits_loses_nothing_that_was_filmed(own_world, picture, monkeypatch):
    session = own_world.next_chunk(own_world.start(picture)).session
    before = session.history.clone(), session.generator_state.clone()
    monkeypatch.setattr(own_world, "_compute_chunk", Failing(own_world, failures=10))
    with pytest.raises(NotEnoughMemory, match="too little GPU memory .* what was filmed before is kept"):
        own_world.next_chunk(session)
    assert torch.equal(session.history, before[0]) and torch.equal(session.generator_state, before[1])


def test_memory_that_ran_out_is_free_before_the_next_try(own_world, picture, monkeypatch):
    """The error holds the frames it came through, and they all that the chunk had on the GPU."""
    held, alive = [], []
    compute = own_world._compute_chunk

    def fail_once(*args):
        if not held:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.append(held[0]())
        return compute(*args)

    monkeypatch.setattr(own_world, "_compute_chunk", fail_once)
    own_world.next_chunk(own_world.start(picture))
    assert alive == [None]


def test_every_plan_films_the_same(small_model, picture):
    made = []
    for plan in PLANS:
        world = infworld.load(small_model, device="cpu")
        world = World(world.config, world.transformer, world.vae, NoText(world.config), plan=plan)
        made.append(world.next_chunk(world.start(picture, "forward 80", guidance=2.0)))
    assert all(torch.equal(chunk.latents, made[0].latents) for chunk in made)


class NoText:
    def __init__(self, config):
        self.shape = (1, config.text_encoder_cfg.model_max_length, config.text_encoder_cfg.dim)

    def encode(self, texts: list[str]) -> TextEmbedding:
        generator = torch.Generator().manual_seed(len(texts[0]))
        return TextEmbedding(torch.randn(self.shape, generator=generator), torch.ones(self.shape[:2]))


def test_the_command_line_keeps_what_was_filmed(own_world, small_model, picture, tmp_path, monkeypatch, capsys):
    compute = own_world._compute_chunk

    def second_fails(session, *args):
        if session.chunk_latents:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(session, *args)

    monkeypatch.setattr(own_world, "_compute_chunk", second_fails)
    monkeypatch.setattr(generate.infworld, "load", lambda *args, **kwargs: own_world)
    film = tmp_path / "film.mp4"
    arguments = ["--image", picture, "--model", small_model, "--frames", 241, "--out", film]
    assert generate.main(list(map(str, arguments))) == 2
    said = capsys.readouterr()
    assert "error: there is too little GPU memory" in said.err and "--resume" in said.out
    assert Session.load(tmp_path / "film.session.safetensors").num_frames == 81 == len(read_mp4(film))


def test_memory_can_be_limited_on_a_gpu_only(small_model, picture, tmp_path, capsys):
    arguments = ["--image", picture, "--model", small_model, "--out", tmp_path / "film.mp4", "--memory-gb", 12]
    assert generate.main([*map(str, arguments), "--device", "cpu"]) == 2
    assert "can be limited on a GPU" in capsys.readouterr().err
