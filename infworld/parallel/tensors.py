"""Sharding of tensors: who computes which tokens, picture rows and texts. The models know only what is injected.

Attention trades tokens for heads (DeepSpeed Ulysses); everything else of a transformer block is per token. The VAE is
sharded by rows of the picture, and neighbours exchange their border rows before each convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from infworld.layers import Attending, Kernel, TokenLayout
from infworld.vae import VideoVAE


def shares(total: int, parts: int) -> list[int]:
    """`total` items in `parts` sizes, as even as possible; the first ones are larger."""
    return [total // parts + (part < total % parts) for part in range(parts)]


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a process group and this one's place among them. Scatters and gathers along any axis."""

    group: ProcessGroup
    size: int
    place: int

    @staticmethod
    def of(group: ProcessGroup) -> RankGroup:
        return RankGroup(group, dist.get_world_size(group), dist.get_rank(group))

    def scatter(self, x: Tensor, dim: int, sizes: list[int] | None = None) -> Tensor:
        """This rank's part of the whole x along an axis, split into `sizes`, by default evenly."""
        return x.split(sizes or shares(x.shape[dim], self.size), dim)[self.place]

    def gather(self, x: Tensor, dim: int, sizes: list[int]) -> Tensor:
        """The parts of all ranks, concatenated along an axis of which rank i has sizes[i]."""
        longest = max(sizes)
        x = x.movedim(dim, 0)
        part = x.new_zeros(longest, *x.shape[1:])
        part[: len(x)] = x
        parts = x.new_empty(self.size * longest, *x.shape[1:])
        dist.all_gather_into_tensor(parts, part, group=self.group)
        pieces = [piece[:size] for piece, size in zip(parts.split(longest), sizes, strict=True)]
        return torch.cat(pieces).movedim(0, dim)

    def exchange(self, x: Tensor, gives: list[int], takes: list[int]) -> list[Tensor]:
        """Sends gives[i] numbers of the flat x to rank i; returns what they sent here, takes[i] numbers each."""
        received = x.new_empty(sum(takes))
        dist.all_to_all_single(received, x.reshape(-1), takes, gives, group=self.group)
        return list(received.split(takes))


@dataclass(frozen=True)
class TokenShard(TokenLayout):
    """The transformer's tokens over several ranks."""

    ranks: RankGroup

    def scatter(self, tokens: Tensor, *lengths: int) -> Tensor:
        """(B, L, ...), parts of so many tokens -> this rank's tokens of each part."""
        return torch.cat([self.ranks.scatter(part, 1) for part in tokens.split(lengths, dim=1)], dim=1)

    def gather(self, tokens: Tensor, length: int) -> Tensor:
        """This rank's tokens (B, l, ...) -> all of them, (B, length, ...)."""
        return self.ranks.gather(tokens, 1, shares(length, self.ranks.size))

    def attention(self, *lengths: int) -> Attending:
        """Attention as a function of a kernel and this rank's queries, keys and values (B, heads, l, d).

        lengths: of the parts that the keys consist of, each split by itself; the queries are the last of them.
        """
        parts = [shares(length, self.ranks.size) for length in lengths]
        return partial(_attend, self.ranks, parts[-1], [sum(each) for each in zip(*parts, strict=True)])


def _attend(
    ranks: RankGroup, queries: list[int], keys: list[int], kernel: Kernel, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Rank i has queries[i] queries and keys[i] keys of all heads; to attend, each gets all tokens of some heads."""
    batch, dim = q.shape[0], q.shape[-1]
    heads = shares(q.shape[1], ranks.size)
    own, number = heads[ranks.place], batch * dim
    packed = torch.cat([x.transpose(0, 1) for x in (q, k, v)], dim=2)  # heads first, so that a rank's are contiguous
    counts = [mine + 2 * theirs for mine, theirs in zip(queries, keys, strict=True)]
    gives = [count * counts[ranks.place] * number for count in heads]
    pieces = ranks.exchange(packed, gives, [own * count * number for count in counts])
    split = [
        piece.view(own, batch, count, dim).split([mine, theirs, theirs], dim=2)
        for piece, count, mine, theirs in zip(pieces, counts, queries, keys, strict=True)
    ]
    # A rank without a head (there are more ranks than heads) has nothing to attend with.
    q, k, v = (torch.cat(parts, dim=2).transpose(0, 1) for parts in zip(*split, strict=True))
    attended = kernel(q, k, v) if own else q
    flat = torch.cat([part.transpose(0, 1).reshape(-1) for part in attended.split(queries, dim=2)])
    here = queries[ranks.place]
    pieces = ranks.exchange(flat, [own * count * number for count in queries], [c * here * number for c in heads])
    return torch.cat(pieces).view(-1, batch, here, dim).transpose(0, 1)


@dataclass(frozen=True)
class SpatialShard:
    """A picture's rows over several ranks: a `vae.PictureShard`, with tensors B T H W C.

    sizes: each rank's rows of latents; larger grids have multiples.
    """

    ranks: RankGroup
    sizes: list[int]

    def scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's rows of the whole x; `dim` is the axis of the rows."""
        return self.ranks.scatter(x, dim, self._scaled(x.shape[dim], sum(self.sizes)))

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' rows."""
        return self.ranks.gather(x, dim, self._scaled(x.shape[dim], self.sizes[self.ranks.place]))

    def with_neighbours(self, x: Tensor) -> Tensor:
        """x with one more row above and below: the neighbours', or zeros at the picture's edges."""
        place, size = self.ranks.place, self.ranks.size
        edges = [x[:, :, :1], x[:, :, -1:]]
        number = edges[0].numel()
        counts = [number if abs(rank - place) == 1 else 0 for rank in range(size)]
        given = [edge for edge, there in zip(edges, (place > 0, place < size - 1), strict=True) if there]
        taken = self.ranks.exchange(torch.stack(given), counts, counts)
        above = taken[place - 1].view_as(edges[0]) if place > 0 else torch.zeros_like(edges[0])
        below = taken[place + 1].view_as(edges[0]) if place < size - 1 else torch.zeros_like(edges[0])
        return torch.cat([above, x, below], dim=2)

    def _scaled(self, rows: int, of: int) -> list[int]:
        return [size * rows // of for size in self.sizes]


@dataclass(frozen=True)
class ShardedVAE:
    """A VAE whose pictures are sharded by rows. Takes and returns whole tensors, as `VideoVAE` does."""

    vae: VideoVAE
    ranks: Callable[[], RankGroup]

    def encode(self, video: Tensor, state: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """See `VideoVAE.encode`."""
        shard = self._shard(video.shape[3] // self.vae.space)
        if shard is None:
            return self.vae.encode(video, state)
        own = None if state is None else {name: shard.scatter(tensor, 2) for name, tensor in state.items()}
        tile = self._tile(shard, video, 1 / self.vae.fold)
        latents, state = self.vae.encode(shard.scatter(video, 3), own, tile, shard)
        return shard.gather(latents, 3), {name: shard.gather(tensor, 2) for name, tensor in state.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """See `VideoVAE.decode`."""
        shard = self._shard(latents.shape[3])
        if shard is None:
            return self.vae.decode(latents)
        tile = self._tile(shard, latents, self.vae.space / self.vae.fold)
        return shard.gather(self.vae.decode(shard.scatter(latents, 3), tile, shard), 3)

    def _shard(self, rows: int) -> SpatialShard | None:
        """None for a picture of too few rows of latents to be split."""
        ranks = self.ranks()
        return SpatialShard(ranks, shares(rows, ranks.size)) if rows >= ranks.size else None

    def _tile(self, shard: SpatialShard, x: Tensor, scale: float) -> int:
        """Latents per pass, by the folded pixels of the rank that has most: all ranks pass the same latents together.

        scale: of a side of x to folded pixels.
        """
        batch, _, _, height, width = x.shape
        largest = batch * width * (height // sum(shard.sizes) * max(shard.sizes))
        return self.vae.default_tile(x.device, round(largest * scale**2))


@dataclass(frozen=True)
class BranchShard:
    """How a film's branches (one per text) are shared out: this rank's are `own`, each with its tokens over `layout`.

    layout: None for tokens that are not split. pair: the group in which the other branch is another rank's, if it is.
    """

    own: slice
    layout: TokenShard | None
    pair: RankGroup | None

    def both(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of both branches of a pair, from this rank's."""
        positive, negative = self.pair.gather(velocity.unsqueeze(0), 0, [1, 1]).unbind()
        return positive, negative
