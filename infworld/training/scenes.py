"""What both trainers see: walks through toy worlds, textured worlds and picture worlds; and the VAE's pool of clips.

Also the walks that are kept for measuring: toy and textured worlds never drawn, and photographs of other packages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from infworld.training.frames import to_video
from infworld.training.pictures import Pictures, load_pictures
from infworld.training.render import render
from infworld.training.run import finish
from infworld.training.stages import (
    Skins,
    Stages,
    cut_stages,
    framing_stages,
    make_skins,
    make_stages,
    render_stages,
    stroll,
    uniform,
)
from infworld.training.walks import FORWARD, MIXED, RIGHT, STILL, sample_actions
from infworld.training.worlds import EVAL_SEEDS, Worlds, captions, make_worlds, spawn, walk

WALK_FRAMES = 81
RENEWED = 64  # walks rendered together
# What is rendered in turn, if there are pictures.
KINDS = ("pictures", "textured", "pictures", "textured", "toy")
KIND_NAMES = sorted(set(KINDS))


@dataclass
class Scenes:
    """Walks through W places of one kind: poses (W, T, 4) on the CPU, captions, and what there is to see."""

    poses: Tensor
    captions: list[str]
    places: Worlds | Stages
    pictures: Pictures | None = None
    skins: Skins | None = None

    def render(self, some: slice, size: tuple[int, int], device: torch.device, compile: bool = False) -> Tensor:
        """Frames (W, T, height, width, 3) uint8 of some of the walks, on the device, where the pictures have to be."""
        places, poses = self.places[some].to(device), self.poses[some].to(device)
        if isinstance(places, Stages):
            return render_stages(places, self.pictures.photos, poses, *size, compile=compile)
        skins = self.skins[some].to(device) if self.skins else None
        return render(places, poses, *size, compile=compile, skins=skins, pictures=self.pictures)


def draw_scenes(
    kind: str,
    seeds: range,
    move: Tensor,
    view: Tensor,
    pictures: Pictures | None,
    generator: torch.Generator,
    varied: bool = False,
) -> Scenes:
    """Walks by actions (W, T) through worlds of those seeds, or for "pictures" before photographs drawn at random.

    Only toy worlds have captions, since nothing is known of what other ones show. varied: moved and turned at half to
    twice the speed, photographs seen from any direction and distance, as fits a VAE; a world model has to know both, so
    that its walks begin with a cut of a photograph.
    Poses are made on the CPU, where the many small steps of a walk start faster.
    """
    count = len(seeds)
    paces = torch.stack([uniform(count, -1, 1, generator) for _ in range(2)], 1).exp2() if varied else None
    if kind != "pictures":
        worlds = make_worlds(seeds)
        poses = walk(worlds, spawn(worlds), move, view, paces)
        if kind == "toy":
            return Scenes(poses, captions(worlds), worlds)
        skins = make_skins(worlds, pictures, generator)
        if not varied:
            skins.zoom = torch.ones_like(skins.zoom)
        return Scenes(poses, [""] * count, worlds, pictures, skins)
    photo = torch.randint(len(pictures.photos), (count,), generator=generator)
    start = torch.zeros(count, 4)
    if varied:
        stages = make_stages(pictures.photos, photo, generator)
        start[:, 2] = 0.3 * torch.randn(count, generator=generator)
    else:
        stages, start[:, 2] = cut_stages(pictures.photos, photo, generator)
    return Scenes(stroll(stages, start, move, view, paces), [""] * count, stages, pictures)


class FramePool:
    """Up to `size` rendered walks, (size, 81, H, W, 3) uint8 on `device`, of worlds `first_seed`, + 1, ...

    pictures: for the worlds of `kinds`, in turn; without them all are toys.
    """

    def __init__(
        self,
        size: int,
        picture: tuple[int, int],
        first_seed: int,
        device: torch.device,
        compile: bool,
        pictures: Pictures | None = None,
        kinds: Sequence[str] = KINDS,
    ):
        self.size, self.picture, self.device, self.compile = size, tuple(picture), device, compile
        self.pictures, self.kinds = pictures, kinds if pictures else ("toy",)
        self.storage = torch.zeros(size, WALK_FRAMES, *self.picture, 3, dtype=torch.uint8, device=device)
        self.first_seed = self.next_seed = first_seed
        self.filled = self.oldest = 0
        self.generator = torch.Generator().manual_seed(first_seed)

    @property
    def frames(self) -> Tensor:
        """The walks that are there, (filled, 81, H, W, 3) uint8."""
        return self.storage[: self.filled]

    @torch.no_grad()
    def renew(self) -> float:
        """Adds some walks, in place of the oldest once the pool is full; returns the seconds it took."""
        finish(self.device)
        began = time.monotonic()
        count = min(RENEWED, self.size)
        done = (self.next_seed - self.first_seed) // count
        frames = self.walks(self.kinds[done % len(self.kinds)], count)
        slots = torch.arange(self.oldest, self.oldest + count) % self.size
        self.storage[slots.to(self.device)] = frames
        self.next_seed += count
        self.filled = min(self.size, max(self.filled, self.oldest + count))
        self.oldest = (self.oldest + count) % self.size
        finish(self.device)
        return time.monotonic() - began

    def clips(self, count: int, frames: int) -> Tensor:
        """Random clips as video, (count, 3, frames, H, W) in [-1, 1]."""
        walks = torch.randint(self.filled, (count, 1), device=self.device)
        first = torch.randint(WALK_FRAMES - frames + 1, (count, 1), device=self.device)
        return to_video(self.storage[walks, first + torch.arange(frames, device=self.device)])

    def walks(self, kind: str, count: int) -> Tensor:
        """Frames (count, 81, H, W, 3) of walks of a kind through the next worlds."""
        move, view = sample_actions(MIXED, count, WALK_FRAMES - 1, self.generator)
        seeds = range(self.next_seed, self.next_seed + count)
        scenes = draw_scenes(kind, seeds, move, view, self.pictures, self.generator, varied=kind != "toy")
        return scenes.render(slice(None), self.picture, self.device, self.compile)


@torch.no_grad()
def measured_walks(
    walks: int,
    size: tuple[int, int],
    device: torch.device,
    packs: Sequence[Path] | None = None,
    kinds: Sequence[str] = KINDS,
) -> dict[str, Tensor]:
    """Walks of 81 frames that training never meets, each (walks, 81, H, W, 3) uint8: "toy" worlds, and with packs (of
    training and of measuring) "textured" worlds of kept textures, if the kinds have them, and "photos", every other of
    which is turned 80 frames to the right, the rest walked into."""
    kept = load_pictures(packs[0], unseen=True).to(device) if packs else None
    pool = FramePool(walks, size, EVAL_SEEDS[0], device, compile=False, pictures=kept)

    def rendered(kind: str) -> Tensor:
        frames = []
        for first in range(0, walks, RENEWED):
            pool.next_seed = EVAL_SEEDS[0] + first
            frames.append(pool.walks(kind, min(RENEWED, walks - first)))
        return torch.cat(frames)

    if not packs:
        return {"toy": rendered("toy")}
    photos = load_pictures(packs[1]).to(device).photos
    number = torch.arange(walks) % len(photos)
    stages = framing_stages(photos, number)
    turned = (torch.arange(walks) % 2 == 0)[:, None].expand(-1, WALK_FRAMES - 1)
    move, view = torch.where(turned, STILL, FORWARD), torch.where(turned, RIGHT, STILL)
    poses = stroll(stages, torch.zeros(walks, 4), move, view)
    seen = render_stages(stages.to(device), photos, poses.to(device), *size)
    worlds = ("toy", "textured") if "textured" in kinds else ("toy",)
    return {kind: rendered(kind) for kind in worlds} | {"photos": seen}
