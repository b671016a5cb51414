"""Chunks of prepared clips (`infworld.videos.dataset`) as batches, each decided by seed, step and place in the batch.

So a run that was stopped goes on with the very batches that it would have met, and any number of GPUs share them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from infworld.text import TextEmbedding
from infworld.training.data import RETURNING
from infworld.training.flow import draw_levels
from infworld.videos.dataset import Clip

FIRST_CHUNK = 0.125  # share of steps whose history is the picture alone
NO_PROMPT = 0.1  # share of samples without their caption
HELD_OUT = 0.1  # share of the chunks that is never a target of training
MEASURED = 8  # held-out chunks at most that are measured together


@dataclass(frozen=True)
class Place:
    """Chunks [start, start + chunks) of a clip as history, the next one as target."""

    clip: Clip
    start: int
    chunks: int


@dataclass(frozen=True)
class Batch:
    """B samples with histories of one length: history (B, C, 1 + 20 n, h, w), target (B, C, 21, h, w), move and view
    (B, 81) int64, text (B, L, caption_channels), mask (B, L), and what they are noised with: noise as the target, level
    (B,) in 0..1."""

    history: Tensor
    target: Tensor
    move: Tensor
    view: Tensor
    text: Tensor
    mask: Tensor
    noise: Tensor
    level: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})


class ClipSampler:
    """Draws training's chunks, and those that are held out.

    Of the clips of the commonest size, the last chunks that have a chunk before them, a tenth of all there are, are
    never a target. A chunk that comes back to what its history lost sight of is drawn up to five times as often
    (`data.WalkPool.batch`). texts: of every caption and of "". shift: of the sampler. most: chunks of history at most;
    fewer where no clip is long enough. Raises ValueError for too few chunks.
    """

    def __init__(self, clips: Sequence[Clip], texts: Mapping[str, TextEmbedding], shift: float, most: int, seed: int):
        by_size: dict[tuple[int, int], list[tuple[Clip, int]]] = defaultdict(list)
        for clip in clips:
            by_size[clip.size] += [(clip, end) for end in range(1, clip.chunks)]
        pairs = max(by_size.values(), key=len, default=[])
        if len(pairs) < 4:
            raise ValueError(
                f"{len(pairs)} chunks of the clips have a chunk before them and 4 are needed: a clip should show 10 "
                "seconds or more without a cut"
            )
        self.held_out = pairs[-max(2, round(HELD_OUT * len(pairs))) :]
        self.clips, self.texts, self.shift, self.seed = list(clips), texts, shift, seed
        self._limits = {clip.path: clip.chunks for clip in clips}
        for clip, end in reversed(self.held_out):
            self._limits[clip.path] = end if end > 1 else 0
        self.most = min(most, max(self._limits.values()) - 1)

    def places(self, step: int, count: int) -> list[Place]:
        """The `count` samples of a step, with histories of one length and clips of one size."""
        rng = random.Random(f"{self.seed} {step}")
        chunks = 0 if rng.random() < FIRST_CHUNK else rng.randint(1, self.most)
        sizes = self._candidates(chunks)
        (places, weights), *_ = rng.choices(sizes, [len(places) for places, _ in sizes])
        return rng.choices(places, weights, k=count)

    def example(self, chunks: int, count: int) -> list[Place]:
        """`count` samples with `chunks` chunks of history, of the largest clips."""
        places, _ = max(self._candidates(chunks), key=lambda candidates: candidates[0][0].clip.size)
        return [places[i % len(places)] for i in range(count)]

    def measured(self, chunks: int) -> list[Place]:
        """Held-out chunks with as long a history, shorter where clips are short: 2 to 8, evenly spread, neighbours far
        apart."""
        chunks = min(chunks, sorted(end for _, end in self.held_out)[-2])
        found = [Place(clip, end - chunks, chunks) for clip, end in self.held_out if end >= chunks]
        count = min(MEASURED, len(found)) // 2 * 2
        spread = [found[i * len(found) // count] for i in range(count)]
        half = count // 2
        return [place for pair in zip(spread[:half], spread[half:], strict=True) for place in pair]

    def batch(self, places: Sequence[Place], step: int, first: int = 0) -> Batch:
        """The samples at these places. first: the index, in the step's samples, of the first of them."""
        rows = [self._row(place, step, first + i) for i, place in enumerate(places)]
        return Batch(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, place: Place, step: int, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {step} {index}").getrandbits(62))
        sample = place.clip.sample(place.start, place.chunks)
        level = draw_levels(1, self.shift, generator=generator)[0]
        dropped = torch.rand((), generator=generator) < NO_PROMPT
        text = self.texts["" if dropped else sample.caption]
        return {
            **{"history": sample.history, "target": sample.target, "move": sample.move, "view": sample.view},
            **{"text": text.hidden[0], "mask": text.mask[0], "level": level},
            "noise": torch.randn(sample.target.shape, generator=generator),
        }

    @cache  # noqa: B019 (one sampler lives as long as the run)
    def _candidates(self, chunks: int) -> list[tuple[list[Place], list[float]]]:
        """For each size of clips: the samples with as long a history, and how often to draw each."""
        found: dict[tuple[int, int], tuple[list[Place], list[float]]] = defaultdict(lambda: ([], []))
        for clip in self.clips:
            needs = clip.needs(chunks).tolist() if chunks < clip.chunks else []
            for start in range(self._limits[clip.path] - chunks):
                places, weights = found[clip.size]
                places.append(Place(clip, start, chunks))
                weights.append(1 + RETURNING * needs[start])
        return list(found.values())
