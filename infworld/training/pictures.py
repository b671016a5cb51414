"""What textured worlds and picture worlds are made of: the pictures of a pack of `collect`, to be looked up.

All pictures of a kind have one size on the device. Each lies there with its halvings, so that a ray that stands for a
large patch of a picture finds that patch's mean.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZES = {"photos": (384, 640), "textures": (256, 256), "skies": (256, 1024)}  # height, width
HELD_OUT = 8  # every eighth texture and sky is kept for unseen worlds


@dataclass
class Atlas:
    """N pictures of one size with their halvings, `texels` (N * texels of one,) int32 of the bytes blue, green, red."""

    texels: Tensor
    size: tuple[int, int]
    aspects: Tensor  # (N,) width over height of the pictures as they were

    def __len__(self) -> int:
        return len(self.aspects)

    def to(self, device: torch.device | str) -> Atlas:
        return replace(self, texels=self.texels.to(device), aspects=self.aspects.to(device))


def make_atlas(pictures: Sequence[Image.Image], size: tuple[int, int]) -> Atlas:
    """Pictures of any sizes, stretched to `size`, both sides multiples of a power of two that leaves a few texels."""
    texels = []
    for picture in pictures:
        level = torch.from_numpy(np.array(picture.resize(size[::-1], Image.Resampling.LANCZOS))).float()
        level = level.movedim(-1, 0)[None]
        for _ in range(levels(size)):
            red, green, blue = level[0].round().int().flatten(1).unbind(0)
            texels.append(blue + (green << 8) + (red << 16))
            level = F.avg_pool2d(level, 2)
    aspects = torch.tensor([picture.width / picture.height for picture in pictures])
    return Atlas(torch.cat(texels), size, aspects)


def levels(size: tuple[int, int]) -> int:
    """How many halvings an atlas has, the whole picture counted: down to 8 texels at the shorter side."""
    return (min(size) // 8).bit_length()


def look_up(texels: Tensor, size: tuple[int, int], picture: Tensor, u: Tensor, v: Tensor, lod: Tensor) -> Tensor:
    """What an atlas shows at places of its pictures, linear between texels and between halvings.

    Args: texels, size: of the atlas. picture: int64, u, v: columns and rows as shares of the width and height, repeated
    beyond 0..1. lod: the binary logarithm of how many texels a side each place stands for. All (F, R), or spread to it.
    Returns: (F, 3, R) linear light, the square of the picture's values.
    """
    lod = lod.clamp(0, levels(size) - 1)
    fine = lod.floor()
    colour = _look_up_level(texels, size, picture, u, v, fine.long())
    coarse = _look_up_level(texels, size, picture, u, v, (fine.long() + 1).clamp(max=levels(size) - 1))
    colour = colour + (coarse - colour) * (lod - fine)[:, None]
    return colour * colour


def _look_up_level(texels: Tensor, size: tuple[int, int], picture, u: Tensor, v: Tensor, level: Tensor) -> Tensor:
    height, width = size[0] >> level, size[1] >> level
    whole = size[0] * size[1]
    each = sum((size[0] >> i) * (size[1] >> i) for i in range(levels(size)))
    before = (whole - (whole >> (2 * level))) * 4 // 3  # texels of the finer levels
    column, row = u * width - 0.5, v * height - 0.5
    left, top = column.floor(), row.floor()
    right, below = (column - left)[:, None], (row - top)[:, None]
    left, top = left.long().remainder(width), top.long().remainder(height)
    next_left, next_top = (left + 1).remainder(width), (top + 1).remainder(height)
    start = picture * each + before

    def read(row: Tensor, column: Tensor) -> Tensor:
        packed = texels[start + row * width + column]
        return torch.stack([(packed >> shift) & 255 for shift in (16, 8, 0)], 1) / 255

    upper, under = read(top, left), read(next_top, left)
    upper = upper + (read(top, next_left) - upper) * right
    under = under + (read(next_top, next_left) - under) * right
    return upper + (under - upper) * below


@dataclass
class Pictures:
    """A pack's three atlases."""

    photos: Atlas
    textures: Atlas
    skies: Atlas

    def to(self, device: torch.device | str) -> Pictures:
        return Pictures(self.photos.to(device), self.textures.to(device), self.skies.to(device))


def load_pictures(pack: Path, unseen: bool = False) -> Pictures:
    """The pictures of a pack, on the CPU. unseen: with the textures and skies that training leaves out, not the rest.

    Raises: ValueError for a pack without pictures.
    """
    found: dict[str, list[Image.Image]] = {kind: [] for kind in SIZES}
    with zipfile.ZipFile(pack) as archive:
        for number, name in enumerate(sorted(archive.namelist())):
            kind = name.split("/")[0]
            if kind in found and (kind == "photos" or (number % HELD_OUT == 0) == unseen):
                found[kind].append(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
    if not any(found.values()):
        raise ValueError(f"{pack} has no pictures in {', '.join(SIZES)}: make it with training.collect")
    black = Image.new("RGB", (8, 8))  # a kind that is missing, as in the pack for measuring, is never looked up
    return Pictures(**{kind: make_atlas(pictures or [black], SIZES[kind]) for kind, pictures in found.items()})
