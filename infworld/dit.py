"""Memory, noisy latents, actions, text -> velocity: the diffusion transformer (spec section 7).

A memory token never depends on the noise or the timestep, so its tokens at the input of every block are computed
once per chunk and text (`encode_memory`) and each sampler step (`denoise`) reads it. `forward` does both: the plain
reference, and what training uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infworld.actions import MOVES, VIEWS
from infworld.config import TransformerConfig
from infworld.layers import (
    EPS,
    LOCAL,
    Attending,
    Attention,
    Kernel,
    TokenLayout,
    gated_add,
    linear_float32,
    linear_gelu,
    modulate,
    modulate_both,
    rope_3d,
)
from infworld.memory import MemoryCompressor
from infworld.offload import Recomputed, StreamedBlocks, StreamedTensors

ACTION_GROUPS, ACTION_EPS = 2, 1e-5

# Where a memory stream is kept: with the model, in the CPU's memory, or not at all and recomputed at each step.
KEEP = {"gpu": tuple, "cpu": StreamedTensors, "recompute": lambda tokens: tokens}


@dataclass(frozen=True)
class TextContext:
    """Per block, the keys and values (B, heads, L, d) of one text for cross-attention."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class MemoryStream:
    """What the noisy tokens read of the memory: its tokens (B, M h w / patch², dim) as they enter each block.

    `tokens` can be iterated any number of times; where they are not kept on the GPU, each is valid until the next.
    """

    tokens: Iterable[Tensor]
    latents: int  # M


class InfiniteWorldTransformer(nn.Module):
    """Compressor, action encoder and transformer: every tensor of `infinite_world_model.ckpt`, by its name."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, patch = config.dim, (1, config.patch, config.patch)
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.caption_channels, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.action_encoder = ActionEncoder(dim, config.action_embed_dim, config.action_hidden_dim)
        self.latent_encoder = MemoryCompressor(config.out_channels, config.memory_hidden_dim, config.memory_num_heads)
        self.blocks = nn.ModuleList(Block(dim, config.ffn_dim, config.num_heads) for _ in range(config.num_layers))
        self.head = Head(dim, config.out_channels * config.patch**2)
        self.narrow_kernel: Kernel | None = None  # for attention in 8 bits (`kernels.use_fastest`)

    def forward(
        self, noisy: Tensor, timestep: Tensor, history: Tensor, move: Tensor, view: Tensor, text: Tensor, mask: Tensor
    ) -> Tensor:
        """Velocity of noisy latents, everything computed.

        noisy (B, 16, T, h, w) with T latents for 4 T - 3 actions; timestep (B,) in 0..1000; history (B, 16, n, h, w)
        latents of all known frames; move, view (B, 4 T - 3) int64 indices; text (B, L, caption_channels) raw encoder
        output and its mask (B, L). Returns float32 (B, 16, T, h, w), noise minus data.
        """
        context = self.embed_text(text, mask)
        stream = self.encode_memory(self.latent_encoder(history.to(self.dtype)), context)
        return self.denoise(noisy, timestep, stream, self.action_encoder(move, view), context)

    def embed_text(self, text: Tensor, mask: Tensor) -> TextContext:
        """Raw text encoder output (B, L, caption_channels) and its mask (B, L) -> keys and values of every block.

        Padding is zeroed before the text MLP and attended to afterwards (spec section 5).
        """
        tokens = self.text_embedding((text * mask.unsqueeze(-1)).to(self.dtype))
        return TextContext(tuple(block.cross_attn.keys_values(tokens) for block in self.blocks))

    def encode_memory(
        self, memory: Tensor, context: TextContext, keep: str = "gpu", layout: TokenLayout = LOCAL
    ) -> MemoryStream:
        """The memory latents (B, 16, M, h, w) through all blocks, modulated for timestep 0.

        keep: "gpu", "cpu" or "recompute", see `KEEP`. layout: where the tokens are.
        """
        tokens = Recomputed(partial(self._memory_tokens, memory, context, layout))
        return MemoryStream(KEEP[keep](tokens), memory.shape[2])

    def extend_memory(self, stream: MemoryStream, latents: Tensor, context: TextContext) -> MemoryStream:
        """The stream with latents (B, 16, n, h, w) added: they see all that was there, which stays as it was.

        What `KeptMemory` does for one film, for batches and with gradients.
        """
        _, modulation = self._embed_time(latents.new_zeros(1))
        x = self._patchify(latents.to(self.dtype), mask_value=1)
        rope = self._rope(latents, stream.latents + latents.shape[2])
        _of_any_length(rope)
        last, extended = len(self.blocks) - 1, []
        for i, (block, known, text) in enumerate(zip(self.blocks, stream.tokens, context.keys_values, strict=True)):
            _of_any_length(known)
            extended.append(torch.cat([known, x], dim=1))
            if i < last:
                x = block.noisy_step(x, known, modulation, rope, text)
        return MemoryStream(tuple(extended), stream.latents + latents.shape[2])

    def denoise(
        self,
        noisy: Tensor,
        timestep: Tensor,
        stream: MemoryStream,
        actions: Tensor,
        context: TextContext,
        layout: TokenLayout = LOCAL,
    ) -> Tensor:
        """Velocity (B, 16, T, h, w) of noisy latents at `timestep` (B,), given memory, actions (B, T, dim) and text.

        layout: where the tokens are, those of `stream` among them.
        """
        time, modulation = self._embed_time(timestep)
        x = rearrange(self._patchify(noisy.to(self.dtype), mask_value=0), "b (t n) c -> b t n c", t=noisy.shape[2])
        x = rearrange(x + actions.unsqueeze(2), "b t n c -> b (t n) c")
        rope = self._rope(noisy, stream.latents + noisy.shape[2])
        length = x.shape[1]
        known = rope.shape[1] - length
        x, rope, attention = (
            layout.scatter(x, length),
            layout.scatter(rope, known, length),
            layout.attention(known, length),
        )
        _of_any_length(rope)
        for block, memory, keys_values in zip(self.blocks, stream.tokens, context.keys_values, strict=True):
            _of_any_length(memory)
            x = block.noisy_step(x, memory, modulation, rope, keys_values, attention)
        x = self.head(x, time)
        return self._unpatchify(layout.gather(x, length), noisy.shape)

    def keep_memory(self, context: TextContext, timesteps: Tensor, size: tuple[int, int], room: int) -> KeptMemory:
        """An empty memory that can be extended, for steps at `timesteps` (S,) with one text.

        size: height and width of a latent. room: latents, of memory and noise together.
        """
        return KeptMemory(self, context, timesteps, size, room)

    def use_kernel(self, kernel: Kernel) -> Kernel:
        """Lets the blocks' self-attention be computed by this kernel; returns the one before."""
        before = self.blocks[0].self_attn.kernel
        for block in self.blocks:
            block.self_attn.kernel = kernel
        return before

    def compile_blocks(self) -> None:
        """Compiles the two steps of a block for training, once for all blocks and for memories of any length.

        The first calls take up to a minute, longer with gradients.
        """
        # One graph for each length of chunk, with and without gradients.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
        for block in self.blocks:
            block.memory_step = torch.compile(block.memory_step, fullgraph=True, options=inductor_options())
            block.noisy_step = torch.compile(block.noisy_step, fullgraph=True, options=inductor_options())

    def offload_blocks(self) -> None:
        """Moves the blocks to the CPU's memory, from where they are streamed through the model's device one by one.

        Results stay the same.
        """
        if not isinstance(self.blocks, StreamedBlocks):
            self.blocks = StreamedBlocks(self.blocks, self.patch_embedding.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def _memory_tokens(self, memory: Tensor, context: TextContext, layout: TokenLayout) -> Iterator[Tensor]:
        """The memory's tokens that are here, as they enter each block."""
        _, modulation = self._embed_time(memory.new_zeros(1))
        x = self._patchify(memory.to(self.dtype), mask_value=1)
        rope = self._rope(memory, memory.shape[2])
        length = x.shape[1]
        x, rope, attention = layout.scatter(x, length), layout.scatter(rope, length), layout.attention(length)
        _of_any_length(x, rope)
        last = len(self.blocks) - 1  # nothing reads the tokens that leave it
        for i, (block, keys_values) in enumerate(zip(self.blocks, context.keys_values, strict=True)):
            yield x
            if i < last:
                x = block.memory_step(x, modulation, rope, keys_values, attention)

    def _embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) in 0..1000 -> time vector (B, dim) and the six modulation vectors (B, 6, dim), float32.

        The timestep is rounded to the weights' dtype first: the released model was trained so.
        """
        half = self.config.freq_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
        angles = timestep.to(self.dtype).double().unsqueeze(1) * frequencies
        x = torch.cat([angles.cos(), angles.sin()], dim=1).float()
        x = linear_float32(self.time_embedding[2], F.silu(linear_float32(self.time_embedding[0], x)))
        return x, linear_float32(self.time_projection[1], F.silu(x)).unflatten(1, (6, -1))

    def _patchify(self, latents: Tensor, mask_value: int) -> Tensor:
        """(B, 16, T, h, w) -> tokens (B, T h w / patch², dim). Mask channels tell memory (1) from noise (0)."""
        b, c, t, h, w = latents.shape
        mask = latents.new_full((b, self.config.in_channels - c, t, h, w), mask_value)
        x = torch.cat([latents, mask], dim=1)
        x = rearrange(x, "b c t (h p) (w q) -> b (t h w) (c p q)", p=self.config.patch, q=self.config.patch)
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, x: Tensor, shape: torch.Size) -> Tensor:
        t, h, w = shape[2:]
        p = self.config.patch
        return rearrange(x, "b (t h w) (p q c) -> b c t (h p) (w q)", t=t, h=h // p, w=w // p, p=p, q=p)

    def _rope(self, latents: Tensor, frames: int) -> Tensor:
        """Rotary angles of the patches of so many latents of this size."""
        h, w = (side // self.config.patch for side in latents.shape[3:])
        head_dim = self.config.dim // self.config.num_heads
        return rope_3d(range(frames), h, w, head_dim, latents.device)


class KeptMemory:
    """A memory that grows: each block's keys and values of its tokens, for each timestep of a schedule.

    What is added sees all that came before it, and what came before is not computed again: a memory that was added at
    once is that of `encode_memory`, one that was added in parts is not. For one film (a batch of 1) on one device.
    """

    def __init__(
        self,
        model: InfiniteWorldTransformer,
        context: TextContext,
        timesteps: Tensor,
        size: tuple[int, int],
        room: int,
    ):
        self.latents = 0  # of memory, so far
        self._model, self._context = model, context
        weight = model.patch_embedding.weight
        self.timesteps = timesteps.to(weight.device)
        zero = self.timesteps.new_zeros(1)  # of the memory's own tokens
        self._time, self._modulation = model._embed_time(torch.cat([zero, self.timesteps]))
        height, width = (side // model.config.patch for side in size)
        self._per_latent = height * width
        heads, head_dim = model.config.num_heads, model.config.dim // model.config.num_heads
        self._rope = rope_3d(range(room), height, width, head_dim, weight.device)
        shape = (len(model.blocks), 2, 1 + len(timesteps), heads, room * self._per_latent, head_dim)
        self._keys_values = weight.new_empty(shape)

    @staticmethod
    def nbytes(config: TransformerConfig, steps: int, size: tuple[int, int], room: int, dtype: torch.dtype) -> int:
        """What one takes: of so many timesteps, with room for so many latents of this size."""
        tokens = room * size[0] * size[1] // config.patch**2
        return config.num_layers * 2 * (1 + steps) * config.dim * tokens * dtype.itemsize

    def extend(self, latents: Tensor) -> None:
        """Adds latents (1, 16, n, h, w) to the memory."""
        x = self._model._patchify(latents.to(self._model.dtype), mask_value=1)
        known, rope = self._place(x)
        last = len(self._model.blocks) - 1  # nothing reads the tokens that leave it
        for i, block in enumerate(self._model.blocks):
            keys, values = self._write(i, slice(None), x, known, rope)
            if i < last:
                text = self._context.keys_values[i]
                x = block.kept_step(x, keys[:1], values[:1], self._modulation[:1], rope, text)
        self.latents += latents.shape[2]

    def denoise(self, noisy: Tensor, step: int, actions: Tensor) -> Tensor:
        """Velocity (1, 16, T, h, w) of noisy latents at `timesteps[step]`, as `InfiniteWorldTransformer.denoise`."""
        model, part = self._model, slice(step + 1, step + 2)
        x = model._patchify(noisy.to(model.dtype), mask_value=0) + actions.repeat_interleave(self._per_latent, dim=1)
        known, rope = self._place(x)
        for i, block in enumerate(model.blocks):
            keys, values = self._write(i, part, x, known, rope)
            x = block.kept_step(x, keys, values, self._modulation[part], rope, self._context.keys_values[i])
        return model._unpatchify(model.head(x, self._time[part]), noisy.shape)

    def _place(self, x: Tensor) -> tuple[int, Tensor]:
        """Tokens known before x, and x's rotary angles."""
        known = self.latents * self._per_latent
        return known, self._rope[:, known : known + x.shape[1]]

    def _write(self, i: int, part: slice, x: Tensor, known: int, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Writes block i's keys and values of x, at these timesteps, behind the known ones; returns all up to there."""
        end = known + x.shape[1]
        keys, values = self._keys_values[i, :, part, :, :end]
        own = self._model.blocks[i].keys_values(x, self._modulation[part], rope)
        keys[:, :, known:], values[:, :, known:] = own
        return keys, values


def inductor_options() -> dict[str, bool]:
    """What torch's compiler is told to leave, by those of its names that this version has."""
    # The fusion leaves the gradients of shifts, scales and gates, which are slices of one tensor, uninitialised
    # (pytorch issue 193061; the option is there from torch 2.10 on). The analysis fails an assertion for some
    # shapes, a batch of 48 or chunks of 5 latents among them.
    harmful = {"triton.mix_order_reduction", "triton.coalesce_tiling_analysis"}
    return dict.fromkeys(harmful & set(torch._inductor.list_options()), False)


def _of_any_length(*tensors: Tensor) -> None:
    """Tells torch.compile that axis 1 of these tensors, the memory's tokens, changes from chunk to chunk."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 1)


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; one step for memory tokens, one for noisy ones."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(dim, num_heads)
        self.norm3 = nn.LayerNorm(dim, eps=EPS)
        self.cross_attn = Attention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))

    def memory_step(
        self,
        memory: Tensor,
        modulation: Tensor,
        rope: Tensor,
        text: tuple[Tensor, Tensor],
        attention: Attending | None = None,
    ) -> Tensor:
        """Memory tokens attend to memory tokens alone; `modulation` (B or 1, 6, dim) is that of timestep 0."""
        vectors = self._vectors(modulation)
        x = modulate(memory, vectors[0], vectors[1])
        queries = self.self_attn.queries(x, rope)
        attended = self.self_attn.attend(queries, *self.self_attn.keys_values(x, rope), attention)
        return self._text_and_ffn(gated_add(memory, attended, vectors[2]), vectors, text)

    def noisy_step(
        self,
        noisy: Tensor,
        memory: Tensor,
        modulation: Tensor,
        rope: Tensor,
        text: tuple[Tensor, Tensor],
        attention: Attending | None = None,
    ) -> Tensor:
        """Noisy tokens attend to memory and noisy tokens together, both modulated for the step's timestep.

        `memory` are the memory tokens as they entered this block. `rope` is of both, memory first.
        """
        vectors = self._vectors(modulation)
        x = modulate_both(memory, noisy, vectors[0], vectors[1])
        own = memory.shape[1]
        queries = self.self_attn.queries(x[:, own:], rope[:, own:])
        attended = self.self_attn.attend(queries, *self.self_attn.keys_values(x, rope), attention)
        return self._text_and_ffn(gated_add(noisy, attended, vectors[2]), vectors, text)

    def keys_values(self, x: Tensor, modulation: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """The self-attention's, (S, heads, L, d) each, of tokens (1, L, dim) for each modulation (S, 6, dim)."""
        shift, scale, *_ = self._vectors(modulation)
        return self.self_attn.keys_values(modulate(x.expand(len(modulation), -1, -1), shift, scale), rope)

    def kept_step(
        self, x: Tensor, keys: Tensor, values: Tensor, modulation: Tensor, rope: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Tokens attend to what `keys_values` returned of all before them and of themselves."""
        vectors = self._vectors(modulation)
        queries = self.self_attn.queries(modulate(x, vectors[0], vectors[1]), rope)
        attended = self.self_attn.attend(queries, keys, values)
        return self._text_and_ffn(gated_add(x, attended, vectors[2]), vectors, text)

    def _text_and_ffn(self, x: Tensor, vectors: tuple[Tensor, ...], text: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.cross_attn.attend(self.cross_attn.queries(self.norm3(x).to(x.dtype)), *text)
        first, _, last = self.ffn
        return gated_add(x, last(linear_gelu(modulate(x, vectors[3], vectors[4]), first)), vectors[5])

    def _vectors(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """shift1, scale1, gate1, shift2, scale2, gate2, each float32 (B, 1, dim)."""
        return (self.modulation.float() + modulation).chunk(6, dim=1)


class Head(nn.Module):
    """Modulated LayerNorm and a linear layer, in float32."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = nn.Linear(dim, out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + time.unsqueeze(1)).chunk(2, dim=1)
        return linear_float32(self.head, modulate(x.float(), shift, scale))


class ActionEncoder(nn.Module):
    """(move, view) per frame -> one vector per latent: 81 -> 21."""

    def __init__(self, dim: int, embed_dim: int, hidden: int):
        super().__init__()
        self.embedding_move = nn.Embedding(len(MOVES), embed_dim)
        self.embedding_view = nn.Embedding(len(VIEWS), embed_dim)
        self.encode_1 = self._half(2 * embed_dim, hidden)
        self.encode_2 = self._half(hidden, hidden)
        self.proj = nn.Linear(hidden, dim)

    @staticmethod
    def _half(dim: int, hidden: int) -> nn.Sequential:
        conv = nn.Conv1d(dim, hidden, 3, stride=2, padding=1)
        return nn.Sequential(conv, nn.GroupNorm(ACTION_GROUPS, hidden, eps=ACTION_EPS), nn.ReLU())

    def forward(self, move: Tensor, view: Tensor) -> Tensor:
        """move, view (B, 4 T - 3) int64 -> (B, T, dim)."""
        x = torch.cat([self.embedding_move(move), self.embedding_view(view)], dim=-1)
        x = self.encode_2(self.encode_1(rearrange(x, "b f c -> b c f")))
        return self.proj(rearrange(x, "b c t -> b t c"))
