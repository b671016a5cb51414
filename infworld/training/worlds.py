"""Procedural first-person worlds: what a small model is trained on, and the truth it is measured against.

A world is a set of tensors drawn from an integer seed; `walk` turns actions into camera poses, and `render`
turns those into frames. Everything is batched over worlds and frames. Units: one unit is about 2.5 m; angles are in
radians unless a name says degrees. Axes: x and y on the ground, z up; yaw 0 looks along +x and grows to the left, pitch
upwards.

Seeds: training worlds are 0, 1, 2, ...; evaluation worlds are those of `EVAL_SEEDS`, which training never draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from infworld import camera
from infworld.camera import DEFAULT as CAMERA
from infworld.training.palettes import PALETTES, Palette, palette_tensor, rgb
from infworld.training.solids import (
    BUILT,
    COLOUR,
    KINDS,
    MARK,
    ROUND,
    SIZES,
    Draws,
    build_balloon,
    build_boxes,
    build_clouds,
    build_rounds,
)

TRAIN_SEEDS = range(0, 10_000_000)
EVAL_SEEDS = range(10_000_000, 11_000_000)

TURN = math.radians(CAMERA.turn_degrees)  # a frame
PITCH = math.radians(CAMERA.pitch_degrees)  # a frame
PITCH_LIMIT = math.radians(CAMERA.pitch_limit)
STEP = CAMERA.step  # units a frame
EYE_HEIGHT = 0.6  # units
FIELD_OF_VIEW = math.radians(CAMERA.fov_degrees)  # horizontal
WALK_RADIUS = 7.5  # units: the walkable disc
BODY_RADIUS = 0.3  # units: how close the camera gets to a landmark

# (forward, left) and (yaw, pitch) of the ten indices of spec section 3; uncertain (9) stands still.
MOVE_DIRECTIONS = tuple((ahead, -aside) for aside, ahead in camera.MOVE_DIRECTIONS.tolist())
VIEW_DIRECTIONS = tuple((-right, up) for right, up in camera.VIEW_DIRECTIONS.tolist())

RIDGE_SAMPLES = 256  # directions in which the height of the mountains is kept


@dataclass
class Worlds:
    """W worlds as tensors; `worlds[index]` selects, `worlds.to(device)` moves."""

    seed: Tensor  # (W,) int64
    palette: Tensor  # (W,) int64
    landmarks: Tensor  # (W, 15, 6): kind (-1 absent), colour index, x, y, radius, height
    solids: Tensor  # (W, N, COLUMNS): boxes first
    footprints: Tensor  # (W, 21, 7): x, y, cos, sin, half x, half y, radius
    sun: Tensor  # (W, 3) unit vector
    tints: Tensor  # (W, 11, 3): see `_tints`
    ground: Tensor  # (W, 20): see `_ground`
    ridge: Tensor  # (W, 2, RIDGE_SAMPLES) slopes of the far and the near mountain ring by azimuth
    haze: Tensor  # (W,) units

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, index) -> "Worlds":
        if isinstance(index, int):
            index = [index]
        return Worlds(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> "Worlds":
        return Worlds(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_worlds(seeds: Sequence[int] | Tensor, difficulty: float = 0.7) -> Worlds:
    """Worlds by seed, on the CPU.

    Args: seeds: W integers >= 0. difficulty: 0 (about 8 landmarks) to 1 (15).
    Raises: ValueError for a difficulty outside [0, 1].
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}, expected 0 to 1")
    seeds = torch.as_tensor(seeds, dtype=torch.int64).reshape(-1)
    draw = Draws(seeds)
    palette = draw.choice(len(PALETTES), 1)[:, 0]
    tint = 1 + draw(1, 3, low=-0.05, high=0.05)
    landmarks = _place_landmarks(draw, difficulty)
    built, built_prints = build_boxes(draw, landmarks[:, :BUILT], palette)
    rounds, round_prints = build_rounds(draw, landmarks[:, BUILT:], palette)
    solids = torch.cat((built, rounds, build_balloon(draw, palette), build_clouds(draw, palette)), 1)
    solids[..., COLOUR : MARK + 3] = (solids[..., COLOUR : MARK + 3] * tint.repeat(1, 1, 2)).clamp(0, 1)
    return Worlds(
        seed=seeds,
        palette=palette,
        landmarks=landmarks,
        solids=solids,
        footprints=torch.cat((built_prints, round_prints), 1),
        sun=_sun(draw, palette),
        tints=_tints(palette) * tint,
        ground=_ground(draw),
        ridge=_ridge(draw, palette),
        haze=palette_tensor(lambda p: p.haze)[palette],
    )


def _place_landmarks(draw: Draws, difficulty: float) -> Tensor:
    """Kinds, colours, sizes and places that leave room to walk between; a landmark without room is left out."""
    tries, gap = 10, 0.95
    slots = BUILT + ROUND
    kind = torch.cat((draw.choice(20, BUILT), draw.choice(20, ROUND)), 1)
    built_kinds = torch.tensor([0] * 9 + [1] * 4 + [2] * 4 + [3] * 3)  # houses are the commonest
    round_kinds = torch.tensor([4] * 5 + [5] * 3 + [6] * 4 + [7] * 4 + [8] * 2 + [9] * 2)
    kind = torch.cat((built_kinds[kind[:, :BUILT]], round_kinds[kind[:, BUILT:]]), 1)
    radius_range, height_range = torch.tensor([SIZES[name] for name in KINDS]).unbind(1)
    radius = torch.lerp(*radius_range[kind].unbind(-1), draw(slots))
    height = torch.lerp(*height_range[kind].unbind(-1), draw(slots))
    present = draw(slots) < 0.55 + 0.45 * difficulty
    distance = 1.2 + 7.4 * draw(slots, tries).sqrt()
    azimuth = draw(slots, tries) * (2 * math.pi)
    places = torch.stack((distance * azimuth.cos(), distance * azimuth.sin()), -1)
    chosen = torch.full((len(kind), slots, 2), 1e3)
    for slot in torch.randperm(slots, generator=torch.Generator().manual_seed(1)).tolist():
        apart = (
            (places[:, slot, :, None] - chosen[:, None]).norm(dim=-1) - radius[:, None] - radius[:, slot, None, None]
        )
        free = apart.amin(-1) > gap
        first = free.int().argmax(-1)
        present[:, slot] &= free.any(-1)
        place = places[torch.arange(len(kind)), slot, first]
        chosen[:, slot] = torch.where(present[:, slot, None], place, chosen[:, slot])
    kind = torch.where(present, kind, -1)
    return torch.cat(
        (kind[..., None], draw.choice(12, slots)[..., None], chosen, radius[..., None], height[..., None]), -1
    )


def _sun(draw: Draws, palette: Tensor) -> Tensor:
    low, high = palette_tensor(lambda p: p.sun_degrees)[palette].unbind(-1)
    elevation = torch.deg2rad(torch.lerp(low, high, draw(1)[:, 0]))
    azimuth = draw(1)[:, 0] * (2 * math.pi)
    return torch.stack((elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()), -1)


def _tints(palette: Tensor) -> Tensor:
    """Zenith, horizon, sun, sunlight, ambient light, two ground tones, patch, path, far and near ridge."""
    return palette_tensor(_palette_tints)[palette]


def _palette_tints(palette: Palette) -> list[list[float]]:
    sun, ambient = palette.light
    zenith, horizon, disc = rgb(palette.zenith), rgb(palette.horizon), rgb(palette.sun)
    sky_light = [ambient * (0.70 + 0.36 * c / max(zenith)) for c in zenith]  # cool shadows
    sunlight = [sun * c for c in disc]
    return [zenith, horizon, disc, sunlight, sky_light, *map(rgb, palette.ground), *map(rgb, palette.ridges)]


def _ground(draw: Draws) -> Tensor:
    """The marks on the floor.

    Tile or stripe rate (along, across), their yaw's cos and sin, three waves of the patches (x, y, phase), the level
    above which they make a patch, the path's cos, sin, offset, half width and bend, the radius of a ring road.
    """
    stripes = draw(1) < 0.35
    pitch = draw(1, low=1.2, high=1.9)
    yaw, path_yaw = draw(1, high=math.pi), draw(1, high=math.pi)
    across = torch.where(stripes, 0.0, math.pi / pitch)
    azimuth, rate = draw(3, high=2 * math.pi), draw(3, low=0.45, high=0.95)
    waves = torch.stack((rate * azimuth.cos(), rate * azimuth.sin(), draw(3, high=2 * math.pi)), -1).flatten(1)
    level = draw(1, low=0.5, high=1.3)
    ring = torch.where(draw(1) < 0.4, draw(1, low=2.5, high=5.5), 1e3)
    path = (
        path_yaw.cos(),
        path_yaw.sin(),
        draw(1, low=-3, high=3),
        draw(1, low=0.35, high=0.6),
        draw(1, low=0, high=0.8),
    )
    return torch.cat((math.pi / pitch, across, yaw.cos(), yaw.sin(), waves, level, *path, ring), -1)


def _ridge(draw: Draws, palette: Tensor) -> Tensor:
    """Slope (tangent of the elevation) of two mountain rings by azimuth, each the upper hull of a few bumps."""
    peaks = 9
    azimuth = torch.arange(RIDGE_SAMPLES) * (2 * math.pi / RIDGE_SAMPLES)
    spacing = torch.arange(peaks) / peaks
    peak = palette_tensor(lambda p: p.peak)[palette][:, None, None]
    rings = []
    for low, high in ((0.13, 0.30), (0.04, 0.15)):
        centre = (spacing + draw(peaks, high=1.2 / peaks)) * (2 * math.pi)
        width, height = draw(peaks, low=0.25, high=0.6), draw(peaks, low=low, high=high)
        away = (azimuth - centre[..., None] + math.pi).remainder(2 * math.pi) - math.pi
        rise = (1 - away.abs() / width[..., None]).clamp(0, 1)
        shape = torch.where(peak > 0, (rise * peak).clamp(max=1), rise * rise * (3 - 2 * rise))
        rings.append((shape * height[..., None]).amax(1) + 0.02)
    return torch.stack(rings, 1)


# --- captions

_PLURALS = {"arch": "arches", "house": "houses"}


def captions(worlds: Worlds) -> list[str]:
    """One plain phrase a world, at most 60 bytes of ASCII: 'sunset, sandy plain, a red tower and cream domes'."""
    return [_caption(int(p), marks) for p, marks in zip(worlds.palette, worlds.landmarks.tolist(), strict=True)]


def _caption(palette: int, landmarks: list[list[float]]) -> str:
    mood = PALETTES[palette]
    sizes: dict[tuple[str, str], list[float]] = {}
    for kind, shade, x, y, radius, height in landmarks:
        if kind >= 0:
            name = (_colour_name(mood, int(kind), int(shade)), KINDS[int(kind)])
            sizes.setdefault(name, []).append(radius * height / (4 + math.hypot(x, y)))
    ranked = sorted(sizes, key=lambda name: -sum(sizes[name]))
    nouns = [_noun(colour, kind, len(sizes[colour, kind])) for colour, kind in ranked[:2]]
    for count in (2, 1, 0):
        text = ", ".join(filter(None, (mood.sky, mood.floor, " and ".join(nouns[:count]))))
        if len(text) <= 60:
            return text
    raise AssertionError("a palette's words alone are longer than 60 bytes")


def _colour_name(mood: Palette, kind: int, shade: int) -> str:
    names, index = {6: (mood.leaves, shade), 7: (mood.leaves, shade), 8: (mood.roofs, shade // 3)}.get(
        kind, (mood.walls, shade)
    )
    return names[index % 12 % len(names)].rsplit(" ", 1)[0]


def _noun(colour: str, kind: str, count: int) -> str:
    if count > 1:
        return f"{colour} {_PLURALS.get(kind, kind + 's')}"
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


# --- motion


def clearance(worlds: Worlds, places: Tensor) -> Tensor:
    """Distance in units from places (W, P, 2) to the nearest landmark's footprint, (W, P); negative inside."""
    return _measure(worlds.footprints, places)[0].amin(-1)


def _measure(footprints: Tensor, places: Tensor) -> tuple[Tensor, ...]:
    """Signed distances (W, P, footprints), local x and y and how far those lie beyond the half sizes."""
    x, y, cos, sin, half_x, half_y, radius = footprints[:, None].unbind(-1)
    away_x, away_y = places[..., 0, None] - x, places[..., 1, None] - y
    local_x, local_y = cos * away_x + sin * away_y, cos * away_y - sin * away_x
    over_x, over_y = local_x.abs() - half_x, local_y.abs() - half_y
    outside = torch.hypot(over_x.clamp(min=0), over_y.clamp(min=0))
    return outside + torch.maximum(over_x, over_y).clamp(max=0) - radius, local_x, local_y, over_x, over_y


def _push_out(footprints: Tensor, place: Tensor) -> Tensor:
    """Places (W, 2) moved straight away from the nearest footprint until the body fits."""
    distances, *local = _measure(footprints, place[:, None])
    distance, index = distances[:, 0].min(-1, keepdim=True)
    local_x, local_y, over_x, over_y = (value[:, 0].gather(1, index) for value in local)
    cos, sin = footprints[..., 2].gather(1, index), footprints[..., 3].gather(1, index)
    outside = torch.maximum(over_x, over_y) > 0
    normal_x = torch.where(outside, over_x.clamp(min=0), (over_x >= over_y).float()) * local_x.sign()
    normal_y = torch.where(outside, over_y.clamp(min=0), (over_x < over_y).float()) * local_y.sign()
    push = (BODY_RADIUS - distance).clamp(min=0) / torch.hypot(normal_x, normal_y).clamp(min=1e-6)
    return place + push * torch.cat((cos * normal_x - sin * normal_y, sin * normal_x + cos * normal_y), 1)


def step(worlds: Worlds, pose: Tensor, move: Tensor, view: Tensor) -> Tensor:
    """One frame of motion; the camera slides along what it meets and stays in the walkable disc.

    The move goes along the mean of the old and the new yaw, so playing the opposite actions backwards retraces the way.

    Args: pose: (W, 4) x, y (units), yaw, pitch (radians). move, view: (W,) indices of spec section 3.
    Returns: (W, 4).
    """
    return _step(worlds, pose, *motions(move, view))


def motions(move: Tensor, view: Tensor, pace: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Actions (W, ...) as (forward, left) in units and (yaw, pitch) in radians, (W, ..., 2) each; pace as in `walk`."""
    device = move.device
    moves = torch.tensor(MOVE_DIRECTIONS, device=device)[move] * STEP
    turns = torch.tensor(VIEW_DIRECTIONS, device=device)[view] * torch.tensor((TURN, PITCH), device=device)
    if pace is None:
        return moves, turns
    return moves * pace[:, None, :1], turns * pace[:, None, 1:]


def walk(worlds: Worlds, start: Tensor, move: Tensor, view: Tensor, pace: Tensor | None = None) -> Tensor:
    """Poses of a walk: the action of frame i leads from frame i to frame i + 1.

    Args: start: (W, 4). move, view: (W, T) indices. pace: (W, 2) how many times as fast to move and to turn.
    Returns: (W, T + 1, 4).
    Raises: ValueError when the shapes do not belong together.
    """
    if move.shape != view.shape or move.dim() != 2 or len(move) != len(worlds) or start.shape != (len(worlds), 4):
        shapes = f"start {tuple(start.shape)}, move {tuple(move.shape)}, view {tuple(view.shape)}"
        raise ValueError(f"{shapes} for {len(worlds)} worlds: expected (W, 4), (W, T), (W, T)")
    moves, turns = motions(move, view, pace)
    poses = [start]
    for frame in range(move.shape[1]):
        poses.append(_step(worlds, poses[-1], moves[:, frame], turns[:, frame]))
    return torch.stack(poses, 1)


def _step(worlds: Worlds, pose: Tensor, move: Tensor, turn: Tensor) -> Tensor:
    """`step` with the action as (forward, left) units and (yaw, pitch) radians, (W, 2) each."""
    place, yaw, pitch = pose[:, :2], pose[:, 2:3], pose[:, 3:]
    heading = yaw + 0.5 * turn[:, :1]
    cos, sin = heading.cos(), heading.sin()
    ahead, aside = move[:, :1], move[:, 1:]
    wish = place + torch.cat((cos * ahead - sin * aside, sin * ahead + cos * aside), 1)
    # Landmarks stand more than two body radii apart, so one push is enough, except against the edge of the disc.
    wish = _stay_in_disc(_push_out(worlds.footprints, wish))
    fits = clearance(worlds, wish[:, None]) >= BODY_RADIUS - 1e-3
    pitch = (pitch + turn[:, 1:]).clamp(-PITCH_LIMIT, PITCH_LIMIT)
    return torch.cat((torch.where(fits, wish, place), yaw + turn[:, :1], pitch), 1)


def _stay_in_disc(place: Tensor) -> Tensor:
    return place * (WALK_RADIUS / place.norm(dim=-1, keepdim=True).clamp(min=WALK_RADIUS))


def spawn(worlds: Worlds, seed: int = 0) -> Tensor:
    """A free, level start pose (W, 4) a world, with room ahead and landmarks in sight; decided by world and seed."""
    tries, device = 48, worlds.sun.device
    rows = [
        torch.rand(tries, 3, generator=torch.Generator().manual_seed(int(s) * 1009 + seed))
        for s in worlds.seed.tolist()
    ]
    draws = torch.stack(rows).to(device)
    distance, azimuth, yaw = 6.5 * draws[..., 0].sqrt(), draws[..., 1] * (2 * math.pi), draws[..., 2] * (2 * math.pi)
    places = torch.stack((distance * azimuth.cos(), distance * azimuth.sin()), -1)
    room = clearance(worlds, places)
    for ahead in (0.7, 1.4, 2.1):
        front = places + ahead * torch.stack((yaw.cos(), yaw.sin()), -1)
        room = torch.minimum(room, clearance(worlds, front))
    score = _sights(worlds, places, yaw) - 8 * (0.75 - room).clamp(min=0)
    best = score.argmax(1)
    rows = torch.arange(len(worlds), device=device)
    pose = torch.cat((places, yaw[..., None], torch.zeros_like(yaw[..., None])), -1)
    return pose[rows, best]


def _sights(worlds: Worlds, places: Tensor, yaw: Tensor) -> Tensor:
    """How much a view (W, P) shows: landmarks by their apparent size, more for those near its centre."""
    kind, _, x, y, radius, height = worlds.landmarks[:, None].unbind(-1)
    away_x, away_y = x - places[..., 0, None], y - places[..., 1, None]
    distance = torch.hypot(away_x, away_y)
    aside = (torch.atan2(away_y, away_x) - yaw[..., None] + math.pi).remainder(2 * math.pi) - math.pi
    size = (radius * height).sqrt() / (distance + 1.0)
    return (size.clamp(max=0.45) * (1 - (aside / 0.7) ** 2).clamp(min=0) * (kind >= 0)).sum(-1)
