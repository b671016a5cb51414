"""Picture worlds: a photograph as a place to turn and walk in, and textures and panoramas for procedural worlds.

A photograph stands around the eye as a closed wall upon level ground: what lies below its horizon is painted on the
ground, the rest on a round backdrop. A ray that leaves a camera anywhere on that stage meets ground or backdrop, and
what it meets has the colour that the photograph shows in that direction from where it was taken. So turning where it
was taken is exactly a homography, walking gives the ground its parallax, and beyond its edges the photograph goes on
mirrored. Units, axes and poses are those of `worlds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from infworld.training.pictures import Atlas, Pictures, look_up
from infworld.training.render import camera, in_batches, pixel_rays
from infworld.training.solids import N_BOXES
from infworld.training.worlds import EYE_HEIGHT, FIELD_OF_VIEW, PITCH_LIMIT, Worlds, motions

NARROW, WIDE = math.tan(math.radians(30)), math.tan(math.radians(45))  # half of the fields of view
SHARPEN = -0.25  # halvings: rays are denser than pixels


@dataclass
class Stages:
    """W picture worlds; `stages[index]` selects, `stages.to(device)` moves."""

    photo: Tensor  # (W,) int64
    half: Tensor  # (W, 2) tangents from the photograph's middle to its right and upper edge
    level: Tensor  # (W,) tangent from the photograph's middle up to its horizon
    radius: Tensor  # (W,) units from its place to the backdrop
    mirrored: Tensor  # (W,) 1, or -1 if left and right are exchanged
    zoom: Tensor  # (W,) tangent of the camera's half field of view over that of `FIELD_OF_VIEW`

    def __len__(self) -> int:
        return len(self.photo)

    def __getitem__(self, index) -> Stages:
        return Stages(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Stages:
        return Stages(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_stages(photos: Atlas, photo: Tensor, generator: torch.Generator) -> Stages:
    """Stages of photographs by their numbers (W,): the camera sees between two thirds and all of a picture's height."""
    count = len(photo)
    zoom = draw_zoom(count, generator)
    upper = 0.75 * math.tan(FIELD_OF_VIEW / 2) * zoom * uniform(count, 1.0, 1.5, generator)
    return Stages(
        photo=photo,
        half=torch.stack([upper * photos.aspects.cpu()[photo], upper], 1),
        level=upper * uniform(count, -0.3, 0.3, generator),
        radius=uniform(count, 5.0, 20.0, generator),
        mirrored=torch.randint(2, (count,), generator=generator) * 2.0 - 1,
        zoom=zoom,
    )


def framing_stages(photos: Atlas, photo: Tensor) -> Stages:
    """Stages on which the camera sees at first what a picture of 3:4 cut from the photograph's middle would show."""
    count, upper = len(photo), 0.75 * math.tan(FIELD_OF_VIEW / 2)
    aspects = photos.aspects.cpu()[photo]
    upper = upper * (4 / 3 / aspects).clamp(min=1)  # a narrow photograph fills the width instead
    one = torch.ones(count)
    half = torch.stack([upper * aspects, upper], 1)
    return Stages(photo=photo, half=half, level=0 * one, radius=10 * one, mirrored=one, zoom=one)


def cut_stages(photos: Atlas, photo: Tensor, generator: torch.Generator) -> tuple[Stages, Tensor]:
    """Stages as of `framing_stages` with more variety, so that no photograph is learned by heart, and the yaw (W,) to
    begin with: at first the camera sees a part of the picture, at most a third smaller than it, half of them mirrored.
    """
    count, sight = len(photo), FIELD_OF_VIEW / 2
    larger = uniform(count, 1.0, 1.5, generator)
    stages = framing_stages(photos, photo)
    stages.half = stages.half * larger[:, None]
    stages.mirrored = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    # Turned further, the camera would see beyond the picture's side, or above and below it in a corner.
    side = torch.atan(stages.half[:, 0]) - sight
    corner = torch.acos(0.75 * math.sin(sight) / stages.half[:, 1]) - sight
    return stages, side.minimum(corner).clamp(min=0) * uniform(count, -1, 1, generator)


def draw_zoom(count: int, generator: torch.Generator) -> Tensor:
    """Fields of view of 60 to 90 degrees, as `Stages.zoom` has them; half of all are as the camera of the app."""
    zoom = uniform(count, NARROW, WIDE, generator) / math.tan(FIELD_OF_VIEW / 2)
    return torch.where(torch.rand(count, generator=generator) < 0.5, 1.0, zoom)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def stroll(stages: Stages, start: Tensor, move: Tensor, view: Tensor, pace: Tensor | None = None) -> Tensor:
    """Poses (W, T + 1, 4) of walks where nothing stands in the way; they stay well within the backdrop.

    Args: start: (W, 4). move, view, pace: as in `worlds.walk`.
    """
    moves, turns = motions(move, view, pace)
    yaw, pitch = (start[:, None, 2:] + turns.cumsum(1)).unbind(2)
    heading = yaw - 0.5 * turns[..., 0]
    cos, sin = heading.cos(), heading.sin()
    ahead, aside = moves.unbind(2)
    steps = torch.stack([cos * ahead - sin * aside, sin * ahead + cos * aside], 2)
    place = start[:, None, :2] + steps.cumsum(1)
    reach = 0.4 * stages.radius[:, None, None]
    place = place * (reach / place.norm(dim=2, keepdim=True).clamp(min=1e-6)).clamp(max=1)
    poses = torch.cat([place, yaw[..., None], pitch.clamp(-PITCH_LIMIT, PITCH_LIMIT)[..., None]], 2)
    return torch.cat([start[:, None], poses], 1)


def render_stages(
    stages: Stages,
    photos: Atlas,
    poses: Tensor,
    height: int,
    width: int,
    supersample: int = 2,
    compile: bool = False,
) -> Tensor:
    """Frames of picture worlds, as `render.render` makes those of procedural ones.

    Args: poses: (W, T, 4), near the place where the photograph was taken, (0, 0), compared to `radius`.
    Returns: (W, T, height, width, 3) uint8.
    """
    rays = pixel_rays(height, width, supersample, 1, poses.device)[0]
    pixel = 2 * math.tan(FIELD_OF_VIEW / 2) / (width * supersample)
    parts = (stages.photo, stages.half, stages.level, stages.radius, stages.mirrored, stages.zoom)

    def colours(some: Tensor, pose: Tensor, compiled) -> Tensor:
        return compiled(_trace_stage)(
            tuple(part[some] for part in parts), photos.texels, photos.size, pose, rays, pixel
        )

    return in_batches(colours, poses, (height, width), supersample, compile)


def _trace_stage(stage: tuple[Tensor, ...], texels: Tensor, size: tuple[int, int], pose: Tensor, rays, pixel) -> Tensor:
    """Linear light (F, 3, R) along rays (R, 2) from poses (F, 4)."""
    photo, half, level, radius, mirrored, zoom = stage
    (eye_x, eye_y, _), (x, y, z) = camera(pose, rays * zoom[:, None, None])
    # Where the ray meets the ground or the backdrop.
    flat = (x * x + y * y).clamp(min=1e-6)
    along = eye_x * x + eye_y * y
    room = radius[:, None] ** 2 - eye_x**2 - eye_y**2
    distance = ((along**2 + flat * room.clamp(min=0)).sqrt() - along) / flat
    distance = torch.where(z < 0, distance.minimum(-EYE_HEIGHT / z), distance)
    x, y, z = eye_x + distance * x, eye_y + distance * y, distance * z
    # Where the photograph shows that.
    upper = half[:, 1:]
    right, edge = mirrored[:, None] * torch.atan2(-y, x), torch.atan(half[:, :1])
    turn = (right + edge).remainder(4 * edge)
    right = torch.where(turn > 2 * edge, 4 * edge - turn, turn) - edge
    across = torch.tan(right)
    reach = torch.hypot(x, y).clamp(min=1e-4)
    rise = z / (reach * right.cos())
    v = (0.5 - 0.5 * (rise - level[:, None]) / upper).remainder(2)
    v = torch.minimum(v, 2 - v)
    nearer = distance / torch.sqrt(reach**2 + z**2)
    # A level of the photograph's halvings in which neighbouring texels are as far apart as neighbouring rays.
    lod = torch.log2(pixel * zoom[:, None] * nearer * size[0] / (2 * upper)) + SHARPEN
    edge_texel = 0.5 / size[1], 0.5 / size[0]
    u = (0.5 + 0.5 * across / half[:, :1]).clamp(edge_texel[0], 1 - edge_texel[0])
    return look_up(texels, size, photo[:, None], u, v.clamp(edge_texel[1], 1 - edge_texel[1]), lod)


@dataclass
class Skins:
    """Textures of W procedural worlds by number in a pack, -1 for none; selected and moved as `Worlds` are."""

    zoom: Tensor  # (W,) as in `Stages`
    ground: Tensor  # (W, 3): texture, units that it covers, share of its own colour
    solids: Tensor  # (W, N, 3): the same of every solid
    sky: Tensor  # (W, 2): panorama, share of a circle that it is turned by
    room: Tensor  # (W, 7): half sizes x and y, height (1e3 out of doors), textures of walls and ceiling, units, light

    def __len__(self) -> int:
        return len(self.zoom)

    def __getitem__(self, index) -> Skins:
        return Skins(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Skins:
        return Skins(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_skins(worlds: Worlds, pictures: Pictures, generator: torch.Generator) -> Skins:
    """Skins for worlds on the CPU: a fifth of them are rooms, two thirds of the others have a sky of a panorama."""
    count, solids = len(worlds), worlds.solids.shape[1]

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) < share

    def texture(*shape: int) -> Tensor:
        return torch.randint(len(pictures.textures), (count, *shape), generator=generator).float()

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    ground = torch.stack([torch.where(chance(0.85), texture(), -1.0), between(1.0, 4.0), between(0.3, 1.0)], 1)
    # All parts of a landmark share a texture, as they lie a fixed number of slots apart; there are few by world.
    few = texture(4)
    pick = few.gather(1, torch.randint(4, (count, solids), generator=generator))
    part = torch.arange(solids)
    boxes, rounds = N_BOXES // 3, (solids - N_BOXES) // 2
    pick = pick[:, torch.where(part < N_BOXES, part % boxes, N_BOXES + (part - N_BOXES) % rounds)]
    pick = torch.where(chance(0.8, solids) & (worlds.solids[..., -1] >= 0), pick, -1.0)  # clouds have none
    walls = torch.stack([pick, between(0.6, 2.0, 1).expand(-1, solids), between(0.2, 1.0, solids)], 2)
    skies = torch.randint(len(pictures.skies), (count,), generator=generator).float()
    sky = torch.stack([torch.where(chance(0.66), skies, -1.0), between(0, 1)], 1)
    indoors = chance(0.2)[:, None]
    outside = torch.full((count, 3), 1e3)
    sizes = torch.where(indoors, torch.stack([between(8, 12), between(8, 12), between(2.5, 6)], 1), outside)
    surfaces = torch.stack([texture(), texture(), between(1.0, 4.0), between(0.5, 1.0)], 1)
    return Skins(
        zoom=draw_zoom(count, generator),
        ground=ground,
        solids=walls,
        sky=sky,
        room=torch.cat([sizes, surfaces], 1),
    )
