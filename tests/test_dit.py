"""The transformer: what is computed once per chunk equals what is computed anew; nothing leaks where it must not."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from infworld.config import TransformerConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.layers import rope_3d, rotate

SIZES = TransformerConfig(
    dim=48, ffn_dim=64, freq_dim=32, num_heads=4, num_layers=3, caption_channels=8,
    memory_hidden_dim=32, memory_num_heads=2, action_embed_dim=8, action_hidden_dim=16,
)  # fmt: skip
LATENTS, FRAMES, HEIGHT, WIDTH, TEXT = 5, 17, 4, 6, 7


@pytest.fixture(scope="module")
def model() -> InfiniteWorldTransformer:
    """In float64, so that what has to be equal differs by rounding in the float32 parts alone."""
    torch.manual_seed(0)
    return InfiniteWorldTransformer(SIZES).double().eval().requires_grad_(False)


def inputs(batch: int = 1, history: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    def actions() -> torch.Tensor:
        return torch.randint(10, (batch, FRAMES), generator=generator)

    mask = (torch.arange(TEXT) < 4).long().repeat(batch, 1)
    return {
        "noisy": normal(16, LATENTS, HEIGHT, WIDTH),
        "timestep": torch.rand(batch, generator=generator) * 999 + 1,
        "history": normal(16, history, HEIGHT, WIDTH),
        "move": actions(),
        "view": actions(),
        "text": normal(TEXT, SIZES.caption_channels),
        "mask": mask,
    }


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def prepare(model, x) -> tuple:
    """What a chunk computes once: memory stream, actions, text."""
    context = model.embed_text(x["text"], x["mask"])
    stream = model.encode_memory(model.latent_encoder(x["history"].to(model.dtype)), context)
    return stream, model.action_encoder(x["move"], x["view"]), context


@pytest.mark.parametrize("history", [1, 9, 85])
def test_one_memory_stream_serves_every_noise_and_timestep(model, history):
    x = inputs(history=history)
    once = prepare(model, x)
    for seed, timestep in enumerate((1000.0, 937.5, 3.0)):
        x["noisy"], x["timestep"] = torch.randn_like(x["noisy"]) * seed, torch.tensor([timestep])
        assert difference(model.denoise(x["noisy"], x["timestep"], *once), model(**x)) < 1e-6


def test_compiled_blocks_are_two_graphs_for_memories_of_any_length(model, monkeypatch):
    """As training compiles them, but the graphs are run by plain torch: inductor needs a C++ compiler."""
    graphs, compile = CompileCounter(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda step, fullgraph, **_: compile(step, fullgraph=fullgraph, backend=graphs)
    )
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    for history in (9, 17, 85):
        x = inputs(history=history)
        assert difference(compiled(**x), model(**x)) < 1e-6
    assert graphs.frame_count == 2


def test_velocity_depends_on_every_input(model):
    x = inputs()
    velocity = model(**x)
    assert velocity.shape == x["noisy"].shape and velocity.dtype == torch.float32
    other = inputs(seed=1)
    for name in ("noisy", "timestep", "history", "move", "view", "text"):
        assert difference(model(**{**x, name: other[name]}), velocity) > 1e-4, name


@pytest.mark.parametrize("history", [1, 9])
def test_two_films_in_a_batch_do_not_meet(model, history):
    both = inputs(batch=2, history=history)
    alone = torch.cat([model(**{name: t[i : i + 1] for name, t in both.items()}) for i in range(2)])
    assert difference(model(**both), alone) < 1e-6
    assert difference(alone[:1], alone[1:]) > 1e-2


def test_what_stands_in_the_padding_does_not_matter_but_padding_does(model):
    x = inputs()
    filled = {**x, "text": x["text"].clone()}
    filled["text"][:, 4:] += 5
    assert torch.equal(model(**filled), model(**x))
    cut = {**x, "text": x["text"][:, :4], "mask": x["mask"][:, :4]}
    assert difference(model(**cut), model(**x)) > 1e-4  # all positions are attended to (spec section 5)


def test_the_last_latent_is_seen_uncompressed(model):
    memory = model.latent_encoder(inputs()["history"])
    x = inputs()
    context = model.embed_text(x["text"], x["mask"])
    actions = model.action_encoder(x["move"], x["view"])
    changed = memory.clone()
    changed[:, :, -1] += 1
    a, b = (model.denoise(x["noisy"], x["timestep"], model.encode_memory(m, context), actions, context)
            for m in (memory, changed))  # fmt: skip
    assert difference(a, b) > 1e-3


def test_an_action_is_felt_near_its_latent_alone():
    """Two convolutions of kernel 3 and stride 2: latent i hears the frames 4 i - 3 to 4 i + 3."""
    torch.manual_seed(0)
    encoder = InfiniteWorldTransformer(SIZES).double().action_encoder.requires_grad_(False)
    # GroupNorm spreads a little of everything everywhere; without it the reach of the convolutions is bare.
    for half in (encoder.encode_1, encoder.encode_2):
        half[1] = torch.nn.Identity()
    x = inputs()
    base = encoder(x["move"], x["view"])
    for frame in range(FRAMES):
        move = x["move"].clone()
        move[:, frame] = (move[:, frame] + 1) % 10
        changed = (encoder(move, x["view"]) - base).abs().amax((0, 2)) > 0
        assert all(abs(4 * i - frame) <= 3 for i in changed.nonzero().flatten().tolist())


def test_bfloat16_is_close_to_float32(model):
    x = {name: t.float() if t.is_floating_point() else t for name, t in inputs().items()}
    x["timestep"] = torch.tensor([936.0])  # which bfloat16 can hold: the cast itself is the released model's
    whole = copy.deepcopy(model).float()(**x)
    half = copy.deepcopy(model).bfloat16()
    velocity = half(**x)
    assert velocity.dtype == torch.float32
    assert (velocity - whole).square().mean().sqrt() < 3e-2 * whole.square().mean().sqrt()
    once = prepare(half, x)
    assert difference(half.denoise(x["noisy"], x["timestep"], *once), velocity) < 1e-6


def test_bfloat16_rounds_the_timestep_before_embedding_it(model):
    half = copy.deepcopy(model).bfloat16()
    a, b, c = (half._embed_time(torch.tensor([t]))[0] for t in (937.5, 936.0, 940.0))
    assert torch.equal(a, b) and not torch.equal(b, c)


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 14).double()

    def product(at: int, to: int) -> float:
        cos_sin = [rope_3d(range(p, p + 1), 1, 1, 14, torch.device("cpu")).double() for p in (at, to)]
        return float((rotate(q, cos_sin[0]) * rotate(k, cos_sin[1])).sum())

    rope = rope_3d(range(3, 5), 2, 3, 14, torch.device("cpu"))
    assert rope.shape == (1, 12, 7, 2)
    x = torch.randn(1, 2, 12, 14)
    assert torch.allclose(rotate(x, rope).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert product(3, 8) == pytest.approx(product(20, 25), abs=1e-5)
    assert product(3, 8) != pytest.approx(product(3, 9), abs=1e-3)


def test_every_parameter_learns():
    model = InfiniteWorldTransformer(SIZES)
    x = {name: t.float() if t.is_floating_point() else t for name, t in inputs().items()}
    model(**x).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_a_token_may_be_one_latent():
    torch.manual_seed(0)
    model = InfiniteWorldTransformer(dataclasses.replace(SIZES, patch=1)).double().eval()
    x = inputs()
    velocity = model(**x)
    assert velocity.shape == x["noisy"].shape
    patches = model._patchify(x["noisy"], mask_value=0)
    assert patches.shape == (1, LATENTS * HEIGHT * WIDTH, SIZES.dim)
    moved = model._patchify(x["noisy"].roll(1, dims=4), mask_value=0).view(LATENTS, HEIGHT, WIDTH, -1)
    assert difference(moved[:, :, 1:], patches.view(LATENTS, HEIGHT, WIDTH, -1)[:, :, :-1]) < 1e-12
    head = torch.arange(LATENTS * HEIGHT * WIDTH * 16.0).view(1, -1, 16)
    assert torch.equal(model._unpatchify(head, x["noisy"].shape)[0, 3, 1, 2, 4], head[0, (HEIGHT + 2) * WIDTH + 4, 3])


def kept(model, x, parts: list[torch.Tensor], timesteps: torch.Tensor):
    """A kept memory of latents that came in parts."""
    context = model.embed_text(x["text"], x["mask"])
    memory = model.keep_memory(context, timesteps, (HEIGHT, WIDTH), room=20)
    for latents in parts:
        memory.extend(latents)
    return memory


def test_a_kept_memory_added_at_once_gives_the_same_velocity_at_every_step(model):
    x, timesteps = inputs(history=9), torch.tensor([1000.0, 500.0, 3.0])
    stream, actions, context = prepare(model, x)
    memory = kept(model, x, [model.latent_encoder(x["history"])], timesteps)
    for step in (0, 2, 1):
        expected = model.denoise(x["noisy"], timesteps[step : step + 1], stream, actions, context)
        assert difference(memory.denoise(x["noisy"], step, actions), expected) < 1e-6


def test_what_is_added_to_a_kept_memory_sees_what_was_there_and_not_the_other_way_round(model):
    x, other, timesteps = inputs(), inputs(seed=1), torch.tensor([700.0])
    first, second = x["history"][:, :, :4], x["history"][:, :, 4:6]
    known, tokens = 4 * HEIGHT * WIDTH // 4, 6 * HEIGHT * WIDTH // 4

    def keys(*parts):
        return kept(model, x, list(parts), timesteps)._keys_values[..., :tokens, :]

    both, changed = keys(first, second), keys(first, other["history"][:, :, 4:6])
    assert torch.equal(both[..., :known, :], changed[..., :known, :])
    assert difference(keys(other["history"][:, :, :4], second)[..., known:, :], both[..., known:, :]) > 1e-4
    assert difference(keys(x["history"][:, :, :6])[..., :known, :], both[..., :known, :]) > 1e-4


def test_the_size_of_a_kept_memory_is_known_before(model):
    memory = kept(model, inputs(), [], torch.tensor([1000.0, 500.0]))
    assert memory.nbytes(SIZES, 2, (HEIGHT, WIDTH), 20, model.dtype) == memory._keys_values.nbytes
