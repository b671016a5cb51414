"""Procedural first-person worlds: what a small model is trained on, and the truth it is measured against.

A world is a set of tensors drawn from an integer seed; `walk` turns actions into camera poses, `render` turns poses
into frames. Everything is batched over worlds and frames. Units: one unit is about 2.5 m; angles are in radians unless
a name says degrees. Axes: x and y on the ground, z up; yaw 0 looks along +x and grows to the left, pitch upwards.

Seeds: training worlds are 0, 1, 2, ...; evaluation worlds are those of `EVAL_SEEDS`, which training never draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

TRAIN_SEEDS = range(0, 10_000_000)
EVAL_SEEDS = range(10_000_000, 11_000_000)

FPS = 30
TURN = math.radians(1.125)  # radians a frame: 80 frames are a quarter turn, 320 a full circle
PITCH = math.radians(0.75)  # radians a frame
PITCH_LIMIT = math.radians(22.5)
STEP = 0.04  # units a frame
EYE_HEIGHT = 0.6  # units
FIELD_OF_VIEW = math.radians(80.0)  # horizontal
WALK_RADIUS = 7.5  # units: the walkable disc
BODY_RADIUS = 0.3  # units: how close the camera gets to a landmark

_DIAGONAL = math.sqrt(0.5)
# (forward, left) and (yaw, pitch) of the ten indices of spec section 3; uncertain (9) stands still.
MOVE_DIRECTIONS = (
    (0.0, 0.0),
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.0, 1.0),
    (0.0, -1.0),
    (_DIAGONAL, _DIAGONAL),
    (_DIAGONAL, -_DIAGONAL),
    (-_DIAGONAL, _DIAGONAL),
    (-_DIAGONAL, -_DIAGONAL),
    (0.0, 0.0),
)
VIEW_DIRECTIONS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 0))


# --- palettes


@dataclass(frozen=True)
class Palette:
    """One mood: words for the caption, colours as RRGGBB, `walls`/`roofs`/`leaves` as 'name RRGGBB' lists."""

    sky: str
    floor: str
    zenith: str
    horizon: str
    sun: str
    sun_degrees: tuple[float, float]  # elevation range
    light: tuple[float, float]  # strength of sun and of ambient light
    ground: tuple[str, str, str, str]  # two tones, patch, path
    ridges: tuple[str, str]  # far, near
    peak: float  # slope of the mountain ring: 1 peaks, 3 mesas, 9 a city skyline, 0 hills
    walls: tuple[str, ...]
    roofs: tuple[str, ...]
    leaves: tuple[str, ...]
    cloud: str
    haze: float = 22.0  # units
    glow: float = 0.0  # how much windows and bands shine by themselves


PALETTES = (
    Palette(
        sky="sunny day",
        floor="green meadow",
        zenith="2f86e0",
        horizon="c9ebf7",
        sun="fff0c8",
        sun_degrees=(32, 50),
        light=(0.72, 0.60),
        ground=("7cc552", "66b246", "a4d65e", "ead7a0"),
        ridges=("8db9de", "5a9c80"),
        peak=0.0,
        walls=("white f7efdc", "red dd4f45", "yellow f6c445", "blue 4484cc"),
        roofs=("red cf4338", "orange ea8136", "blue 3568b4"),
        leaves=("green 3b9c49", "lime 8dc93c", "dark green 26805a"),
        cloud="ffffff",
    ),
    Palette(
        sky="sunset",
        floor="sandy plain",
        zenith="54488f",
        horizon="ffb06f",
        sun="ffb066",
        sun_degrees=(13, 20),
        light=(0.80, 0.58),
        ground=("f0b876", "dfa066", "d08458", "fbdfa8"),
        ridges=("b5699c", "8a4766"),
        peak=3.0,
        walls=("red cf5638", "cream f8e0b4", "teal 2aa198", "purple 8450a0"),
        roofs=("teal 1f8f8a", "gold f4b22e", "crimson b32f44"),
        leaves=("green 5d9650", "olive a3a548", "dark green 3d7a52"),
        cloud="ffc9a8",
    ),
    Palette(
        sky="snowy dawn",
        floor="snow field",
        zenith="5f97dc",
        horizon="fbd6d6",
        sun="ffe9d0",
        sun_degrees=(18, 28),
        light=(0.58, 0.62),
        ground=("eef3fb", "d6e3f3", "abd4ee", "c3cfe4"),
        ridges=("aec4e6", "7893c6"),
        peak=1.0,
        walls=("red dc4444", "blue 3b70bd", "yellow f3c14c", "white fafaff"),
        roofs=("red c93a45", "navy 2c4a86", "white ffffff"),
        leaves=("dark green 23705c", "teal 3f9c8c", "pale blue a8d8dc"),
        cloud="fff2f2",
    ),
    Palette(
        sky="neon night",
        floor="dark plaza",
        zenith="0b0a2c",
        horizon="5a2c86",
        sun="d5dcff",
        sun_degrees=(24, 40),
        light=(0.40, 0.72),
        ground=("37306e", "2a2458", "43409a", "c2449c"),
        ridges=("3c2470", "231650"),
        peak=9.0,
        walls=("blue 3c55c8", "purple 7a45c4", "pink d2479e", "teal 1f8fa8"),
        roofs=("cyan 37e6f5", "pink ff55c0", "yellow ffdd4a"),
        leaves=("cyan 2fc8d8", "magenta d64ad0", "lime 8cf060"),
        cloud="4a3590",
        haze=26.0,
        glow=0.9,
    ),
    Palette(
        sky="candy sky",
        floor="pink candy land",
        zenith="6cbcff",
        horizon="ffe6f3",
        sun="fff6df",
        sun_degrees=(30, 45),
        light=(0.52, 0.66),
        ground=("fbc3dc", "f5a9cd", "b5f0d8", "fff0c0"),
        ridges=("d5b6f7", "b98fe8"),
        peak=0.0,
        walls=("pink ff6fa8", "mint 6fe0bc", "yellow ffe05a", "lilac a98cf2"),
        roofs=("red f04a6a", "blue 4aa8f0", "lilac 9a78ec"),
        leaves=("mint 4fd0a0", "pink ff8fc0", "orange ffa24d"),
        cloud="fff4fa",
    ),
    Palette(
        sky="autumn day",
        floor="golden field",
        zenith="3a8be0",
        horizon="fff0d6",
        sun="ffe2a8",
        sun_degrees=(24, 38),
        light=(0.76, 0.58),
        ground=("deba66", "c9a252", "e39a44", "f3e2b8"),
        ridges=("b9a3c2", "a8683c"),
        peak=0.0,
        walls=("cream f6e6c6", "brown 96603e", "white faf6ee", "blue 54789e"),
        roofs=("brown 7d4632", "red b83d2e", "blue 3c5878"),
        leaves=("orange ec7828", "red cc3d2c", "gold f5b92e"),
        cloud="fff6e6",
    ),
    Palette(
        sky="bright noon",
        floor="tropical island",
        zenith="1484e4",
        horizon="b9f0f4",
        sun="fff7da",
        sun_degrees=(46, 60),
        light=(0.62, 0.60),
        ground=("f8e5ac", "efd592", "46cfcc", "fff6dc"),
        ridges=("7cc8dc", "2f9c86"),
        peak=0.0,
        walls=("white fdfaf2", "coral ff7458", "turquoise 2cc0c0", "yellow ffce48"),
        roofs=("coral f05a48", "blue 2678c8", "orange f59a3c"),
        leaves=("green 2fae5c", "lime 9ad544", "dark green 178068"),
        cloud="ffffff",
    ),
    Palette(
        sky="misty morning",
        floor="lavender field",
        zenith="8ea6e6",
        horizon="f8e4ea",
        sun="ffe6cc",
        sun_degrees=(20, 32),
        light=(0.60, 0.64),
        ground=("b194e2", "9678cf", "94c686", "ece0f0"),
        ridges=("b8b2e2", "8c86c4"),
        peak=0.0,
        walls=("cream fbeed6", "purple 7d54b0", "rose e8849c", "white fdfbff"),
        roofs=("purple 6a449e", "slate 56659a", "rose d86684"),
        leaves=("green 5fa872", "sage 9cc48c", "teal 3d8c88"),
        cloud="fff4f4",
        haze=17.0,
    ),
    Palette(
        sky="teal dusk",
        floor="violet planet",
        zenith="16497e",
        horizon="9ce6cc",
        sun="fff0c0",
        sun_degrees=(20, 34),
        light=(0.66, 0.62),
        ground=("9468c2", "7f54ae", "dd6f9c", "d9bdf0"),
        ridges=("5fa6b4", "41669c"),
        peak=1.0,
        walls=("white f6f1ea", "orange f58c34", "blue 3d7cc4", "red e0505a"),
        roofs=("yellow ffcf4a", "white fcfaf6", "teal 22a59c"),
        leaves=("coral ff7a5c", "yellow f7c948", "cyan 52d0d6"),
        cloud="dff7ec",
    ),
    Palette(
        sky="moonlit night",
        floor="blue meadow",
        zenith="0c1c48",
        horizon="4478ac",
        sun="dfeaff",
        sun_degrees=(22, 38),
        light=(0.46, 0.70),
        ground=("2f6a70", "26585f", "3f8276", "7f9cb0"),
        ridges=("2f548c", "1a3560"),
        peak=1.0,
        walls=("blue 4668a4", "white b8c6dc", "red a04658", "violet 6a5aa6"),
        roofs=("yellow ffd766", "orange ffb04e", "yellow ffe28c"),
        leaves=("green 2f7c60", "teal 2a6f80", "blue 3c6aa0"),
        cloud="3d6496",
        haze=24.0,
        glow=0.9,
    ),
)


def _rgb(colour: str) -> list[float]:
    """'name RRGGBB' or 'RRGGBB' -> linear light, with the gamma of 2 that `render` undoes."""
    code = colour.split()[-1]
    return [(int(code[i : i + 2], 16) / 255) ** 2 for i in (0, 2, 4)]


def _palette_tensor(read) -> Tensor:
    return torch.tensor([read(palette) for palette in PALETTES], dtype=torch.float32)


# --- scene

KINDS = ("house", "arch", "pyramid", "obelisk", "tower", "dome", "round tree", "tall tree", "mushroom", "rotunda")
BUILT = 6  # landmark slots made of boxes (the first four kinds)
ROUND = 9  # landmark slots made of solids of revolution (the other kinds)
CLOUDS = 3
N_BOXES = BUILT * 3
N_ROUNDS = ROUND * 2 + 2 + CLOUDS * 2  # two of a balloon, two a cloud
SHADED = N_BOXES + ROUND * 2 + 2  # the solids before the clouds cast shadows

# Columns of a solid. Boxes: half sizes that shrink by `slope` per unit of height (roofs, pyramids).
# Solids of revolution: radius^2 = q0 + q1 z + q2 z^2 above the base (cylinders, cones, ellipsoids).
X, Y, Z, H, COS, SIN, HX, HY, SX, SY, Q0, Q1, Q2 = range(13)
COLOUR, MARK = 13, 16  # three columns each
LOW, HIGH, HALF, GLOW = 19, 20, 21, 22  # the mark: share of the height from, to; half width in units; own light
COLUMNS = 23

RIDGE_SAMPLES = 256
MAP_SIZE, MAP_EXTENT = 200, 10.0  # the ground light map covers [-extent, extent]^2


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


class _Draws:
    """Uniform numbers of many worlds, taken from the left: the same seed always sees the same ones."""

    SIZE = 900

    def __init__(self, seeds: Tensor):
        generator = torch.Generator()
        rows = [torch.rand(self.SIZE, generator=generator.manual_seed(seed)) for seed in seeds.tolist()]
        self.rows = torch.stack(rows) if rows else torch.empty(0, self.SIZE)
        self.used = 0

    def __call__(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        count = math.prod(shape)
        taken = self.rows[:, self.used : self.used + count]
        self.used += count
        return (low + (high - low) * taken).reshape(-1, *shape)

    def choice(self, count: int, *shape: int) -> Tensor:
        return (self(*shape) * count).long().clamp(max=count - 1)


def make_worlds(seeds: Sequence[int] | Tensor, difficulty: float = 0.7) -> Worlds:
    """Worlds by seed, on the CPU.

    Args: seeds: W integers >= 0. difficulty: 0 (about 8 landmarks) to 1 (15).
    Raises: ValueError for a difficulty outside [0, 1].
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}, expected 0 to 1")
    seeds = torch.as_tensor(seeds, dtype=torch.int64).reshape(-1)
    draw = _Draws(seeds)
    palette = draw.choice(len(PALETTES), 1)[:, 0]
    tint = 1 + draw(1, 3, low=-0.05, high=0.05)
    landmarks = _place_landmarks(draw, difficulty)
    built, built_prints = _build_boxes(draw, landmarks[:, :BUILT], palette)
    rounds, round_prints = _build_rounds(draw, landmarks[:, BUILT:], palette)
    solids = torch.cat((built, rounds, _balloon(draw, palette), _clouds(draw, palette)), 1)
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
        haze=_palette_tensor(lambda p: p.haze)[palette],
    )


def _place_landmarks(draw: _Draws, difficulty: float) -> Tensor:
    """Kinds, colours, sizes and places that leave room to walk between; a landmark without room is left out."""
    tries, gap = 10, 0.95
    slots = BUILT + ROUND
    kind = torch.cat((draw.choice(20, BUILT), draw.choice(20, ROUND)), 1)
    built_kinds = torch.tensor([0] * 9 + [1] * 4 + [2] * 4 + [3] * 3)  # houses are the commonest
    round_kinds = torch.tensor([4] * 5 + [5] * 3 + [6] * 4 + [7] * 4 + [8] * 2 + [9] * 2)
    kind = torch.cat((built_kinds[kind[:, :BUILT]], round_kinds[kind[:, BUILT:]]), 1)
    radius_range = torch.tensor(
        [
            [1.0, 1.45],
            [1.2, 1.5],
            [1.1, 1.6],
            [0.45, 0.6],
            [0.5, 0.75],
            [0.9, 1.5],
            [0.7, 1.0],
            [0.65, 0.95],
            [0.8, 1.2],
            [0.9, 1.3],
        ]
    )
    height_range = torch.tensor(
        [
            [1.9, 2.7],
            [1.8, 2.5],
            [1.7, 2.8],
            [2.6, 3.8],
            [3.0, 4.6],
            [1.1, 1.8],
            [2.2, 2.9],
            [2.4, 3.6],
            [1.6, 2.3],
            [1.8, 2.4],
        ]
    )
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


def _named_colours(names: str, palette: Tensor, index: Tensor) -> Tensor:
    """Linear RGB of the `index`-th wall, roof or leaf colour (modulo how many there are)."""
    table = _palette_tensor(lambda p: [_rgb(getattr(p, names)[i % len(getattr(p, names))]) for i in range(12)])
    return table[palette[:, None], index.long() % 12]


def _blank(worlds: int, slots: int) -> Tensor:
    """Solids that no ray meets: of negative height."""
    solids = torch.zeros(worlds, slots, COLUMNS)
    solids[..., H] = -1.0
    solids[..., COS] = 1.0
    solids[..., HIGH] = -1.0
    return solids


def _set(solids: Tensor, where: Tensor, columns: dict[int, Tensor | float]) -> None:
    """Write columns (W, slots) or colours (W, slots, 3) of those solids where `where` (W, slots) holds."""
    for column, value in columns.items():
        if isinstance(value, Tensor) and value.dim() == 3:
            solids[..., column : column + 3] = torch.where(where[..., None], value, solids[..., column : column + 3])
        else:
            solids[..., column] = torch.where(where, value, solids[..., column])


def _build_boxes(draw: _Draws, landmarks: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Houses, arches, pyramids and obelisks: three boxes a landmark and two footprints."""
    kind, shade, x, y, radius, height = landmarks.unbind(-1)
    yaw, lean, style = draw(BUILT, high=math.pi), draw(BUILT), draw(BUILT)
    cos, sin = yaw.cos(), yaw.sin()
    wall = _named_colours("walls", palette, shade)
    other = _named_colours("walls", palette, shade + 1)
    roof = _named_colours("roofs", palette, shade // 3)
    glow = _palette_tensor(lambda p: p.glow)[palette][:, None].expand_as(x)
    mark = torch.where((glow > 0)[..., None], _named_colours("roofs", palette, shade), other)
    first, second, third = (_blank(len(x), BUILT) for _ in range(3))
    for part in (first, second, third):
        _set(part, kind >= 0, {X: x, Y: y, COS: cos, SIN: sin, COLOUR: wall, MARK: mark, GLOW: glow, HALF: 9.0})

    house = kind == 0
    hx, hy = radius * (0.62 + 0.1 * lean), radius * (0.78 - 0.1 * lean)
    body, roof_height = height * 0.58, height * 0.42
    gable = style < 0.6
    _set(first, house, {H: body, HX: hx, HY: hy, LOW: 0.0, HIGH: 0.58, HALF: radius * 0.2})
    eaves_x, eaves_y = hx * 1.14, hy * 1.14
    _set(second, house, {Z: body, H: roof_height, HX: eaves_x, HY: eaves_y, COLOUR: roof})
    _set(second, house, {SX: eaves_x / roof_height, SY: torch.where(gable, 0.0, eaves_y / roof_height), HIGH: -1.0})
    chimney_x, chimney_y = x - cos * hx * 0.55 - sin * hy * 0.5, y - sin * hx * 0.55 + cos * hy * 0.5
    _set(third, house & (style < 0.4), {X: chimney_x, Y: chimney_y, Z: body, H: roof_height * 0.95, HX: 0.13, HY: 0.13})

    arch = kind == 1
    side = radius * 0.78
    for part, sign in ((first, 1.0), (second, -1.0)):
        columns = {X: x - sign * sin * side, Y: y + sign * cos * side, H: height * 0.78, HX: 0.24, HY: 0.24}
        _set(part, arch, columns | {LOW: 0.42, HIGH: 0.6})
    _set(third, arch, {Z: height * 0.78, H: height * 0.22, HX: 0.3, HY: side + 0.42, COLOUR: roof, HIGH: -1.0})

    pyramid = kind == 2
    base = radius * 0.72
    columns = {H: height, HX: base, HY: base, SX: base / height, SY: base / height}
    _set(first, pyramid, columns | {LOW: 0.62, HIGH: 1.0, MARK: roof})

    obelisk = kind == 3
    half, shaft = radius * 0.7, height * 0.85
    _set(first, obelisk, {H: shaft, HX: half, HY: half, SX: half * 0.35 / shaft, SY: half * 0.35 / shaft})
    _set(first, obelisk, {LOW: 0.55, HIGH: 0.72})
    tip = half * 0.65
    slope = tip / (height - shaft)
    _set(
        second, obelisk, {Z: shaft, H: height - shaft, HX: tip, HY: tip, SX: slope, SY: slope, COLOUR: roof, HIGH: -1.0}
    )

    solids = torch.cat((first, second, third), 1)
    prints = torch.stack([_box_footprint(part, arch | (part is first)) for part in (first, second)], 2)
    return solids, prints.flatten(1, 2)


def _box_footprint(part: Tensor, where: Tensor) -> Tensor:
    footprint = part[..., [X, Y, COS, SIN, HX, HY, Q0]]
    return _present(footprint, where & (part[..., H] > 0))


def _present(footprint: Tensor, where: Tensor) -> Tensor:
    """Absent footprints lie far outside the world."""
    away = torch.tensor([1e3, 1e3, 1.0, 0.0, 0.0, 0.0, 0.0])
    return torch.where(where[..., None], footprint, away)


def _build_rounds(draw: _Draws, landmarks: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Towers, domes, trees, mushrooms and rotundas: two solids of revolution a landmark and one footprint."""
    kind, shade, x, y, radius, height = landmarks.unbind(-1)
    style = draw(ROUND)
    wall = _named_colours("walls", palette, shade)
    roof = _named_colours("roofs", palette, shade // 3)
    leaf = _named_colours("leaves", palette, shade)
    trunk = torch.tensor(_rgb("8a5a3c")).expand_as(wall)
    pale = torch.tensor(_rgb("fbeedd")).expand_as(wall)
    glow = _palette_tensor(lambda p: p.glow)[palette][:, None].expand_as(x)
    low, top = _blank(len(x), ROUND), _blank(len(x), ROUND)
    for part in (low, top):
        _set(part, kind >= 0, {X: x, Y: y, COLOUR: wall, MARK: roof, HALF: 9.0, GLOW: glow})
    foot = radius.clone()

    tower = kind == 4
    body = height * 0.72
    _set(low, tower, _cone(radius, radius * 0.82, body) | {LOW: 0.55, HIGH: 0.75})
    pointed = style < 0.65
    _set(top, tower & pointed, _cone(radius * 1.2, radius * 0.0, height - body) | {Z: body, COLOUR: roof})
    _set(top, tower & ~pointed, _ellipsoid(radius * 1.0, radius * 1.1, 0.0) | {Z: body, COLOUR: roof})

    dome = kind == 5
    _set(low, dome, _ellipsoid(radius, height, 0.0) | {LOW: 0.0, HIGH: 0.24})
    knob = _ellipsoid(radius * 0.16, radius * 0.16, -1.0) | {Z: height - radius * 0.05, COLOUR: roof}
    _set(top, dome, knob)

    broad = kind == 6
    _set(low, broad, _cone(radius * 0.2, radius * 0.16, height * 0.5) | {COLOUR: trunk})
    _set(top, broad, _ellipsoid(radius, height * 0.33, -1.0) | {Z: height * 0.34, COLOUR: leaf})
    foot = torch.where(broad, radius * 0.2, foot)

    tall = kind == 7
    _set(low, tall, _cone(radius * 0.2, radius * 0.2, height * 0.2) | {COLOUR: trunk})
    _set(top, tall, _cone(radius, radius * 0.0, height * 0.88) | {Z: height * 0.12, COLOUR: leaf})
    foot = torch.where(tall, radius * 0.85, foot)

    mushroom = kind == 8
    _set(low, mushroom, _cone(radius * 0.32, radius * 0.24, height * 0.7) | {COLOUR: pale})
    _set(top, mushroom, _ellipsoid(radius, height * 0.42, 0.0) | {Z: height * 0.58, COLOUR: roof, MARK: pale})
    _set(top, mushroom, {LOW: 0.42, HIGH: 0.62, GLOW: 0.0})
    foot = torch.where(mushroom, radius * 0.32, foot)

    rotunda = kind == 9
    _set(low, rotunda, _cone(radius * 0.82, radius * 0.82, height * 0.56) | {LOW: 0.62, HIGH: 0.86})
    _set(top, rotunda & pointed, _cone(radius, radius * 0.0, height * 0.44) | {Z: height * 0.56, COLOUR: roof})
    _set(top, rotunda & ~pointed, _ellipsoid(radius * 0.86, height * 0.4, 0.0) | {Z: height * 0.56, COLOUR: roof})
    foot = torch.where(rotunda, radius * 0.82, foot)
    _set(top, tower | broad | tall | rotunda | dome, {HIGH: -1.0})
    _set(low, broad | tall | mushroom, {HIGH: -1.0})

    zero, one = torch.zeros_like(x), torch.ones_like(x)
    prints = torch.stack((x, y, one, zero, zero, zero, foot), -1)
    return torch.cat((low, top), 1), _present(prints, kind >= 0)


def _cone(bottom: Tensor, top: Tensor, height: Tensor) -> dict[int, Tensor]:
    slope = (top - bottom) / height
    return {H: height, HX: bottom, Q0: bottom**2, Q1: 2 * bottom * slope, Q2: slope**2}


def _ellipsoid(radius: Tensor, half: Tensor, cut: float) -> dict[int, Tensor]:
    """An ellipsoid of half height `half`, kept above `cut` (-1 bottom, 0 equator); z counts from the cut."""
    ratio = (radius / half) ** 2
    centre = -cut * half
    return {H: half - cut * half, HX: radius, Q0: radius**2 - ratio * centre**2, Q1: 2 * ratio * centre, Q2: -ratio}


def _balloon(draw: _Draws, palette: Tensor) -> Tensor:
    """A hot-air balloon somewhere above every other world."""
    present = draw(1) < 0.5
    distance, azimuth, size = draw(1, low=4.0, high=9.5), draw(1, high=2 * math.pi), draw(1, low=0.8, high=1.2)
    level, shade = draw(1, low=2.6, high=3.8), draw.choice(12, 1)
    envelope, basket = _blank(len(palette), 1), _blank(len(palette), 1)
    place = {X: distance * azimuth.cos(), Y: distance * azimuth.sin()}
    colours = {COLOUR: _named_colours("walls", palette, shade + 1), MARK: _named_colours("roofs", palette, shade)}
    _set(envelope, present, place | colours | _ellipsoid(size, size * 1.15, -0.95))
    _set(envelope, present, {Z: level, LOW: 0.42, HIGH: 0.66, HALF: 9.0})
    _set(basket, present, place | _cone(size * 0.2, size * 0.24, size * 0.3) | {Z: level - size * 0.42})
    _set(basket, present, {COLOUR: torch.tensor(_rgb("8a5a3c")).expand(len(palette), 1, 3)})
    return torch.cat((envelope, basket), 1)


def _clouds(draw: _Draws, palette: Tensor) -> Tensor:
    """Clouds with flat bottoms high above: a large lump and a smaller one at its side."""
    present = draw(CLOUDS) < 0.75
    distance, azimuth = draw(CLOUDS, low=11.0, high=20.0), draw(CLOUDS, high=2 * math.pi)
    size, level, side = draw(CLOUDS, low=1.8, high=3.0), draw(CLOUDS, low=4.5, high=8.5), draw(CLOUDS, low=-1, high=1)
    white = _palette_tensor(lambda p: _rgb(p.cloud))[palette][:, None].expand(-1, CLOUDS, 3)
    large, small = _blank(len(palette), CLOUDS), _blank(len(palette), CLOUDS)
    for lump, share, aside in ((large, 1.0, 0.0), (small, 0.66, 1.0)):
        away = azimuth + aside * side.sign() * size / distance
        columns = {X: distance * away.cos(), Y: distance * away.sin(), Z: level, COLOUR: white, GLOW: -1.0}
        _set(lump, present, columns | _ellipsoid(size * share, size * share * 0.42, -0.25))
    return torch.cat((large, small), 1)


def _sun(draw: _Draws, palette: Tensor) -> Tensor:
    low, high = _palette_tensor(lambda p: p.sun_degrees)[palette].unbind(-1)
    elevation = torch.deg2rad(torch.lerp(low, high, draw(1)[:, 0]))
    azimuth = draw(1)[:, 0] * (2 * math.pi)
    return torch.stack((elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()), -1)


def _tints(palette: Tensor) -> Tensor:
    """Zenith, horizon, sun, sunlight, ambient light, two ground tones, patch, path, far and near ridge."""
    return _palette_tensor(_palette_tints)[palette]


def _palette_tints(palette: Palette) -> list[list[float]]:
    sun, ambient = palette.light
    zenith, horizon, disc = _rgb(palette.zenith), _rgb(palette.horizon), _rgb(palette.sun)
    sky_light = [ambient * (0.70 + 0.36 * c / max(zenith)) for c in zenith]  # cool shadows
    sunlight = [sun * c for c in disc]
    return [zenith, horizon, disc, sunlight, sky_light, *map(_rgb, palette.ground), *map(_rgb, palette.ridges)]


def _ground(draw: _Draws) -> Tensor:
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


def _ridge(draw: _Draws, palette: Tensor) -> Tensor:
    """Slope (tangent of the elevation) of two mountain rings by azimuth, each the upper hull of a few bumps."""
    peaks = 9
    azimuth = torch.arange(RIDGE_SAMPLES) * (2 * math.pi / RIDGE_SAMPLES)
    spacing = torch.arange(peaks) / peaks
    peak = _palette_tensor(lambda p: p.peak)[palette][:, None, None]
    rings = []
    for low, high in ((0.13, 0.30), (0.04, 0.15)):
        centre = (spacing + draw(peaks, high=1.2 / peaks)) * (2 * math.pi)
        width, height = draw(peaks, low=0.25, high=0.6), draw(peaks, low=low, high=high)
        away = (azimuth - centre[..., None] + math.pi).remainder(2 * math.pi) - math.pi
        rise = (1 - away.abs() / width[..., None]).clamp(0, 1)
        shape = torch.where(peak > 0, (rise * peak).clamp(max=1), rise * rise * (3 - 2 * rise))
        rings.append((shape * height[..., None]).amax(1) + 0.02)
    return torch.stack(rings, 1)


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
    moves = torch.tensor(MOVE_DIRECTIONS, device=pose.device)[move] * STEP
    turns = torch.tensor(VIEW_DIRECTIONS, device=pose.device)[view] * torch.tensor((TURN, PITCH), device=pose.device)
    return _step(worlds, pose, moves, turns)


def walk(worlds: Worlds, start: Tensor, move: Tensor, view: Tensor) -> Tensor:
    """Poses of a walk: the action of frame i leads from frame i to frame i + 1.

    Args: start: (W, 4). move, view: (W, T) indices. Returns: (W, T + 1, 4).
    Raises: ValueError when the shapes do not belong together.
    """
    if move.shape != view.shape or move.dim() != 2 or len(move) != len(worlds) or start.shape != (len(worlds), 4):
        shapes = f"start {tuple(start.shape)}, move {tuple(move.shape)}, view {tuple(view.shape)}"
        raise ValueError(f"{shapes} for {len(worlds)} worlds: expected (W, 4), (W, T), (W, T)")
    moves = torch.tensor(MOVE_DIRECTIONS, device=start.device)[move] * STEP
    turns = torch.tensor(VIEW_DIRECTIONS, device=start.device)[view] * torch.tensor((TURN, PITCH), device=start.device)
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


# --- rendering

_FAR = 1e4
_TINY = 1e-7
_INDEX_BITS = 63  # a hit distance carries its solid's index (< 64) in its lowest bits, so one minimum finds both


def render(
    worlds: Worlds, poses: Tensor, height: int = 96, width: int = 128, supersample: int = 2, compile: bool = False
) -> Tensor:
    """Frames seen from poses.

    Args: poses: (W, T, 4) on the worlds' device. supersample: rays per pixel and direction. compile: through
    `torch.compile`, worth its start-up time from some ten thousand frames on.
    Returns: (W, T, height, width, 3) uint8.
    Raises: ValueError for poses of another shape or device.
    """
    if poses.dim() != 3 or len(poses) != len(worlds) or poses.shape[-1] != 4:
        raise ValueError(f"poses {tuple(poses.shape)} for {len(worlds)} worlds: expected (W, T, 4)")
    if poses.device != worlds.sun.device:
        raise ValueError(f"poses on {poses.device}, worlds on {worlds.sun.device}: move one of them")
    count, frames = poses.shape[:2]
    light = _ground_light(worlds)
    world = torch.arange(count, device=poses.device).repeat_interleave(frames)
    flat = poses.reshape(-1, 4)
    strips = 1 if compile else next(n for n in (4, 2, 1) if width % n == 0)
    rays = _pixel_rays(height, width, supersample, strips, poses.device)
    size = _chunk_size(poses.device, rays.shape[1], compile)
    trace = _compiled_trace() if compile else _trace
    pictures = []
    for start in range(0, len(flat), size):
        index = torch.arange(start, start + size, device=poses.device).clamp(max=len(flat) - 1)
        index = index if compile else index.unique()  # compiled code wants one shape: its last chunk repeats a frame
        some, pose = world[index], flat[index]
        scene = (worlds.solids, worlds.sun, worlds.tints, worlds.ground, worlds.ridge, worlds.haze, light)
        scene = tuple(part[some] for part in scene)
        for strip in rays:  # eager rendering meets only the solids in sight of a strip of the picture
            near = None if compile else _visible_solids(scene[0], pose, strip)
            colour = trace(scene, pose, strip, near)
            pictures.append(_to_picture(colour, height, width // strips, supersample)[: len(flat) - start])
    picture = torch.cat([torch.cat(pictures[i : i + strips], 2) for i in range(0, len(pictures), strips)])
    return picture.reshape(count, frames, height, width, 3)


@lru_cache(maxsize=1)
def _compiled_trace():
    return torch.compile(_trace, dynamic=False)


def _chunk_size(device: torch.device, rays: int, compile: bool) -> int:
    """Frames at a time: a few GB of GPU memory, or what keeps a CPU's cache warm."""
    budget = (12_000_000 if compile else 5_000_000) if device.type == "cuda" else 50_000
    return max(1, budget // rays)


def _pixel_rays(height: int, width: int, supersample: int, strips: int, device: torch.device) -> Tensor:
    """Tangents (right, up) of the rays, (strips, rays, 2): vertical strips, within them row by row."""
    rows, columns = height * supersample, width * supersample
    scale = 2 * math.tan(FIELD_OF_VIEW / 2) / columns
    right = (torch.arange(columns, device=device) + 0.5 - columns / 2) * scale
    up = (rows / 2 - 0.5 - torch.arange(rows, device=device)) * scale
    right = right.reshape(strips, 1, -1).expand(-1, rows, -1)
    return torch.stack((right, up[None, :, None].expand_as(right)), -1).flatten(1, 2)


def _to_picture(colour: Tensor, height: int, width: int, supersample: int) -> Tensor:
    """Linear light (F, 3, rays) -> (F, height, width, 3) uint8."""
    colour = colour.reshape(-1, 3, height, supersample, width, supersample).mean((3, 5))
    return (colour.clamp(0, 1).sqrt() * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _visible_solids(solids: Tensor, pose: Tensor, rays: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (F, K) of the boxes and of the other solids in sight of the rays; K is the most that any frame needs."""
    cos, sin = pose[:, 3].cos()[:, None], pose[:, 3].sin()[:, None]
    right, up = rays.unbind(-1)
    ahead = torch.cat((cos - sin * up.amin(), cos - sin * up.amax()), -1)  # (F, 2): forward part of a ray
    edges = torch.stack((right.amin(), right.amax()))
    angles = torch.atan2(edges[:, None], ahead[:, None]).flatten(1)  # (F, 4), to the right
    middle, half = 0.5 * (angles.amax(-1) + angles.amin(-1)), 0.5 * (angles.amax(-1) - angles.amin(-1))
    away_x, away_y = solids[..., X] - pose[:, None, 0], solids[..., Y] - pose[:, None, 1]
    distance = torch.hypot(away_x, away_y).clamp(min=1e-6)
    reach = _reach(solids)
    spread = torch.where(distance > reach, torch.asin((reach / distance).clamp(max=1)), math.pi)
    aside = pose[:, None, 2] - torch.atan2(away_y, away_x) - middle[:, None]
    aside = (aside + math.pi).remainder(2 * math.pi) - math.pi
    seen = (aside.abs() <= half[:, None] + spread + 0.01) & (solids[..., H] > 0)
    return _first_true(seen[:, :N_BOXES]), _first_true(seen[:, N_BOXES:]) + N_BOXES


def _reach(solids: Tensor) -> Tensor:
    """Horizontal radius around the axis that holds the whole solid."""
    widest = solids[..., Q1] / (-2 * solids[..., Q2]).clamp(min=_TINY)  # where an ellipsoid is widest
    widest = widest.clamp(min=0).minimum(solids[..., H].clamp(min=0))
    levels = torch.stack((torch.zeros_like(widest), widest, solids[..., H]))
    squares = solids[..., Q0] + levels * (solids[..., Q1] + levels * solids[..., Q2])
    is_box = torch.arange(solids.shape[-2], device=solids.device) < N_BOXES
    return torch.where(is_box, torch.hypot(solids[..., HX], solids[..., HY]), squares.amax(0).clamp(min=0).sqrt())


def _first_true(mask: Tensor) -> Tensor:
    """Indices of the true entries first; as many as the fullest row has (at least one)."""
    count = max(1, int(mask.sum(-1).max()))
    order = torch.argsort(mask.to(torch.uint8), dim=-1, descending=True, stable=True)
    return order[:, :count]


def _hit_boxes(origin: tuple[Tensor, ...], ray: tuple[Tensor, ...], box: tuple[Tensor, ...]) -> Tensor:
    """Distance to the boxes (columns of shape (..., K, 1)), `_FAR` where missed. The interval between the last face
    entered and the first one left is empty for a miss."""
    away_x, away_y, low = origin[0] - box[X], origin[1] - box[Y], origin[2] - box[Z]
    at_x, at_y = box[COS] * away_x + box[SIN] * away_y, box[COS] * away_y - box[SIN] * away_x
    to_x, to_y = box[COS] * ray[0] + box[SIN] * ray[1], box[COS] * ray[1] - box[SIN] * ray[0]
    first, second = -low / ray[2], (box[H] - low) / ray[2]
    enter, leave = torch.minimum(first, second), torch.maximum(first, second)
    for at, to, half, slope in ((at_x, to_x, box[HX], box[SX]), (at_y, to_y, box[HY], box[SY])):
        room, shrink = half - slope * low, slope * ray[2]
        for gap, speed in ((room - at, shrink + to), (room + at, shrink - to)):
            time = gap / speed
            enter = torch.maximum(enter, torch.where(speed < 0, time, -_FAR))
            leave = torch.minimum(leave, torch.where(speed < 0, _FAR, time))
    return torch.where((enter < leave) & (enter > 0) & (box[H] > 0), enter, _FAR)


def _hit_rounds(origin: tuple[Tensor, ...], ray: tuple[Tensor, ...], solid: tuple[Tensor, ...]) -> Tensor:
    """Distance to the solids of revolution, `_FAR` where missed: the nearer root of a quadratic within the height, else
    the farther one (the inside of an open end)."""
    away_x, away_y, low = origin[0] - solid[X], origin[1] - solid[Y], origin[2] - solid[Z]
    bend = solid[Q2] * low
    a = ray[0] * ray[0] + ray[1] * ray[1] - solid[Q2] * (ray[2] * ray[2])
    b = away_x * ray[0] + away_y * ray[1] - (0.5 * solid[Q1] + bend) * ray[2]
    c = away_x * away_x + away_y * away_y - solid[Q0] - (solid[Q1] + bend) * low
    square = b * b - a * c
    root, scale = square.clamp(min=0).sqrt(), 1 / a
    one, two = (-b - root) * scale, (root - b) * scale
    first, second = torch.minimum(one, two), torch.maximum(one, two)
    first_up, second_up = low + first * ray[2], low + second * ray[2]
    second = torch.where((second_up > 0) & (second_up < solid[H]) & (second > 0), second, _FAR)
    hit = torch.where((first_up > 0) & (first_up < solid[H]) & (first > 0), first, second)
    return torch.where(square > 0, hit, _FAR)


def _nearest(distance: Tensor, index: Tensor) -> Tensor:
    """Minimum over the solids (dim 1) of distances whose lowest bits are replaced by the solid's index, as int32."""
    return ((distance.view(torch.int32) & ~_INDEX_BITS) | index).amin(1)


def _columns(solids: Tensor) -> tuple[Tensor, ...]:
    """Geometry columns of (F, K, COLUMNS) solids, each (F, K, 1) to stand against the rays."""
    return solids[..., None, : Q2 + 1].unbind(-1)


def _trace(scene: tuple[Tensor, ...], pose: Tensor, rays: Tensor, near) -> Tensor:
    """Linear light along every ray.

    Args: scene: solids, sun, tints, ground, ridge, haze and light map of each frame's world, (F, ...). pose: (F, 4).
    rays: (R, 2). near: indices from `_visible_solids`, or None for all solids.
    Returns: (F, 3, R).
    """
    solids, sun, tints, ground, ridge, haze, light = scene
    origin, ray = _camera(pose, rays)
    if near is None:
        index = torch.arange(solids.shape[1], dtype=torch.int32, device=solids.device)[:, None]
        boxes, rounds = solids[:, :N_BOXES], solids[:, N_BOXES:]
        box_index, round_index = index[:N_BOXES], index[N_BOXES:]
    else:
        frame = torch.arange(len(pose), device=pose.device)[:, None]
        boxes, rounds = (solids[frame, part] for part in near)
        box_index, round_index = (part[..., None].int() for part in near)
    spread_origin, spread_ray = (tuple(v[:, None] for v in vector) for vector in (origin, ray))  # against (F, K, 1)
    key = torch.minimum(
        _nearest(_hit_boxes(spread_origin, spread_ray, _columns(boxes)), box_index),
        _nearest(_hit_rounds(spread_origin, spread_ray, _columns(rounds)), round_index),
    )
    distance = (key & ~_INDEX_BITS).view(torch.float32)
    index = (key & _INDEX_BITS).long()
    down = torch.where(ray[2] < -1e-4, -EYE_HEIGHT / ray[2], _FAR)

    tint = tints[..., None].unbind(1)  # (F, 3, 1) each, as colours are (F, 3, R)
    sunward = sun[:, :, None].unbind(1)  # (F, 1) each
    facing = sum(s * r for s, r in zip(sunward, ray, strict=True))
    sky, fog = _sky(ray, facing, tint, ridge, sunward)
    solid, is_cloud = _shade_solid(solids, index, origin, ray, distance, sunward, tint)
    floor = _shade_ground(ground, light, origin, ray, down, tint)
    hit = torch.minimum(distance, down)
    surface = torch.where((distance < down)[:, None], solid, floor)
    depth = torch.where(is_cloud & (distance < down), 0.5, hit / haze[:, None])
    clear = torch.exp(-depth * depth)[:, None]
    return torch.where((hit < 0.5 * _FAR)[:, None], fog + (surface - fog) * clear, sky)


def _camera(pose: Tensor, rays: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Eye (F, 1) and unit directions (F, R), x y z each."""
    x, y, yaw, pitch = pose[..., None].unbind(1)
    right, up = rays.unbind(-1)
    scale = torch.rsqrt(1 + right * right + up * up)
    ahead = (pitch.cos() - up * pitch.sin()) * scale
    aside = right * scale
    rise = (pitch.sin() + up * pitch.cos()) * scale
    rise = torch.where(rise.abs() < 1e-6, 1e-6, rise)
    ray = (ahead * yaw.cos() + aside * yaw.sin(), ahead * yaw.sin() - aside * yaw.cos(), rise)
    return (x, y, torch.full_like(x, EYE_HEIGHT)), ray


def _sky(ray, facing: Tensor, tint: Sequence[Tensor], ridge: Tensor, sunward) -> tuple[Tensor, Tensor]:
    """Colour of the sky with its sun and mountains, and the colour of the haze in that direction, (F, 3, R)."""
    zenith, horizon, disc = tint[0], tint[1], tint[2]
    slope = ray[2] * torch.rsqrt((1 - ray[2] * ray[2]).clamp(min=_TINY))
    high = (ray[2].clamp(min=0) * 1.5).clamp(max=1)
    toward = facing.clamp(min=0.5)  # no denormal powers: they are slow
    glow = (toward**14 * 0.28 + toward**90 * 0.35)[:, None]
    fog = horizon + (disc - horizon) * (glow * 0.8)
    sky = horizon + (zenith - horizon) * (high * (2 - high))[:, None]
    sky = sky + (disc - sky) * glow
    sky = sky + (disc.clamp(min=0.8) - sky) * ((facing - 0.9945) * 900).clamp(0, 1)[:, None]
    place = (torch.atan2(ray[1], ray[0]) * (RIDGE_SAMPLES / (2 * math.pi))).remainder(RIDGE_SAMPLES)
    left = place.long().clamp(max=RIDGE_SAMPLES - 1)
    part, right = place - left, (left + 1) % RIDGE_SAMPLES
    turn = ray[0] * sunward[1] - ray[1] * sunward[0]
    for layer, colour in ((0, tint[9]), (1, tint[10])):
        low, next_low = ridge[:, layer].gather(1, left), ridge[:, layer].gather(1, right)
        crest = low + (next_low - low) * part
        sunlit = ((next_low - low) * RIDGE_SAMPLES * turn).clamp(-1, 1)
        body = colour * (1 + 0.12 * sunlit)[:, None]
        body = body + (fog - body) * (0.55 - 2.2 * slope).clamp(0.0, 0.55)[:, None]
        sky = torch.where((slope < crest)[:, None], body, sky)
    return sky, fog


def _lit(albedo: Tensor, normal, shaded: Tensor, sunward, tint: Sequence[Tensor]) -> Tensor:
    """Soft Lambert light from the sun, sky light from above and some of the ground's colour from below."""
    lambert = sum(n * s for n, s in zip(normal, sunward, strict=True))
    lambert = torch.where(shaded, 0.0, ((lambert + 0.15) / 1.15).clamp(min=0))
    up = 0.5 + 0.5 * normal[2]
    ambient = tint[4] * (0.45 + 0.55 * up)[:, None] + 0.10 * tint[5] * (1 - up)[:, None]
    return albedo * (tint[3] * lambert[:, None] + ambient)


def _shade_solid(solids: Tensor, index: Tensor, origin, ray, distance: Tensor, sunward, tint) -> tuple[Tensor, Tensor]:
    """Light from the hit solids (F, 3, R), and which of them are clouds (F, R)."""
    table = solids.transpose(1, 2).gather(2, index[:, None].expand(-1, COLUMNS, -1))  # (F, COLUMNS, R)
    solid = table.unbind(1)
    distance = distance.clamp(max=100.0)
    x, y, z = (o + distance * r for o, r in zip(origin, ray, strict=True))
    away_x, away_y, low = x - solid[X], y - solid[Y], z - solid[Z]
    local_x = solid[COS] * away_x + solid[SIN] * away_y
    local_y = solid[COS] * away_y - solid[SIN] * away_x
    normal, across = _normal(solid, index < N_BOXES, away_x, away_y, local_x, local_y, low)
    inward = sum(n * r for n, r in zip(normal, ray, strict=True)) > 0
    normal = tuple(torch.where(inward, -n, n) for n in normal)

    share = low / solid[H]
    marked = (share > solid[LOW]) & (share < solid[HIGH]) & (across < solid[HALF])
    albedo = torch.where(marked[:, None], table[:, MARK : MARK + 3], table[:, COLOUR : COLOUR + 3])
    grounded = 0.72 + 0.28 * (z * 1.6).clamp(0, 1)
    lit = _lit(albedo, normal, inward, sunward, tint) * grounded[:, None]
    shine = torch.where(marked, solid[GLOW], 0.0).clamp(min=0)[:, None]
    lit = lit + (albedo - lit) * shine
    is_cloud = solid[GLOW] < 0
    return torch.where(is_cloud[:, None], albedo * (0.88 + 0.12 * normal[2])[:, None], lit), is_cloud


def _normal(solid, is_box: Tensor, away_x, away_y, local_x, local_y, low) -> tuple[tuple[Tensor, ...], Tensor]:
    """Outward unit normal, and how far the point lies from the middle of a box's face."""
    room_x = solid[HX] - solid[SX] * low - local_x.abs()
    room_y = solid[HY] - solid[SY] * low - local_y.abs()
    room_z = torch.minimum(low, solid[H] - low).abs()
    on_x = (room_x.abs() <= room_y.abs()) & (room_x.abs() <= room_z)
    on_y = ~on_x & (room_y.abs() <= room_z)
    face_x = torch.where(on_x, local_x.sign(), 0.0)
    face_y = torch.where(on_y, local_y.sign(), 0.0)
    top = torch.where(low > 0.5 * solid[H], 1.0, -1.0)
    face_z = torch.where(on_x, solid[SX], torch.where(on_y, solid[SY], top))
    box = (solid[COS] * face_x - solid[SIN] * face_y, solid[SIN] * face_x + solid[COS] * face_y, face_z)
    rise = -(0.5 * solid[Q1] + solid[Q2] * low)
    normal = tuple(torch.where(is_box, b, r) for b, r in zip(box, (away_x, away_y, rise), strict=True))
    scale = torch.rsqrt((normal[0] ** 2 + normal[1] ** 2 + normal[2] ** 2).clamp(min=_TINY))
    across = torch.where(is_box, torch.where(on_x, local_y.abs(), local_x.abs()), 0.0)
    return tuple(n * scale for n in normal), across


def _shade_ground(ground: Tensor, light: Tensor, origin, ray, down: Tensor, tint: Sequence[Tensor]) -> Tensor:
    """Floor colours under sun, shadow and sky; edges soften, then fade, with distance."""
    g = ground[:, :, None].unbind(1)
    distance = down.clamp(max=60.0)
    x, y = origin[0] + distance * ray[0], origin[1] + distance * ray[1]
    blur = 0.03 + distance * distance * 0.010

    def edge(value: Tensor, softness) -> Tensor:
        return (0.5 + 0.5 * value / softness).clamp(0, 1)

    along, across = g[2] * x + g[3] * y, g[2] * y - g[3] * x
    tile = torch.sin(along * g[0]) * torch.cos(across * g[1])
    waves = sum(torch.sin(g[4 + 3 * i] * x + g[5 + 3 * i] * y + g[6 + 3 * i]) for i in range(3))
    colour = tint[5] + (tint[7] - tint[5]) * edge(waves - g[13], blur * 1.2)[:, None]
    colour = colour * (1 + (tint[6] / tint[5] - 1) * edge(tile, blur * 1.7)[:, None])  # seen on the patches too
    forward, aside = g[14] * x + g[15] * y, g[14] * y - g[15] * x
    road = g[17] - (aside - g[16] - g[18] * torch.sin(0.6 * forward)).abs()
    ring = g[17] - (torch.hypot(x, y) - g[19]).abs()
    colour = colour + (tint[8] - colour) * edge(torch.maximum(road, ring), blur)[:, None]
    sunlight, shade = _read_light(light, x, y)
    return colour * (tint[3] * sunlight[:, None] + tint[4] * shade[:, None])


def _read_light(light: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Sunlight (Lambert and shadow) and openness to the sky at points of the ground, bilinear in (F, 2, M, M) maps."""
    scale, last = MAP_SIZE / (2 * MAP_EXTENT), MAP_SIZE - 1
    column = ((x + MAP_EXTENT) * scale - 0.5).clamp(0, last - 1e-3)
    row = ((y + MAP_EXTENT) * scale - 0.5).clamp(0, last - 1e-3)
    left, top = column.long(), row.long()
    right, below = column - left, row - top
    corner = top * MAP_SIZE + left

    def read(texels: Tensor) -> Tensor:  # (F, M * M)
        upper, next_upper = texels.gather(1, corner), texels.gather(1, corner + 1)
        under, next_under = texels.gather(1, corner + MAP_SIZE), texels.gather(1, corner + MAP_SIZE + 1)
        upper = upper + (next_upper - upper) * right
        return upper + (under + (next_under - under) * right - upper) * below

    return read(light[:, 0].flatten(1)), read(light[:, 1].flatten(1))


def _ground_light(worlds: Worlds) -> Tensor:
    """Light maps of the ground (W, 2, M, M): sunlight with soft cast shadows, and how open to the sky it is."""
    device = worlds.sun.device
    pitch = 2 * MAP_EXTENT / MAP_SIZE
    axis = (torch.arange(MAP_SIZE, device=device) + 0.5) * pitch - MAP_EXTENT
    places = torch.stack((axis.repeat(MAP_SIZE), axis.repeat_interleave(MAP_SIZE)), -1)
    chunk, parts = (16, 1) if device.type == "cuda" else (1, 8)
    maps = []
    for i in range(0, len(worlds), chunk):
        maps.append(torch.cat([_light_of(worlds[i : i + chunk], part) for part in places.chunk(parts)], 2))
    light = torch.cat(maps).unflatten(2, (MAP_SIZE, MAP_SIZE))
    for _ in range(2):
        light = F.avg_pool2d(F.pad(light, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return light


def _light_of(worlds: Worlds, places: Tensor) -> Tensor:
    """Unsmoothed sunlight and openness, (W, 2, P), at ground places (P, 2)."""
    origin = (places[:, 0], places[:, 1], torch.full_like(places[:, 0], 1e-3))
    sun = worlds.sun[:, :, None, None].unbind(1)
    boxes = _hit_boxes(origin, sun, _columns(worlds.solids[:, :N_BOXES])).amin(1)
    rounds = _hit_rounds(origin, sun, _columns(worlds.solids[:, N_BOXES:SHADED])).amin(1)
    shadow = torch.minimum(boxes, rounds) < 0.5 * _FAR
    distance = clearance(worlds, places[None].expand(len(worlds), -1, -1))
    openness = 0.55 + 0.45 * (distance / 0.55).clamp(0, 1).sqrt()
    sunlight = torch.where(shadow, 0.0, ((worlds.sun[:, 2:] + 0.35) / 1.35).expand_as(distance))
    return torch.stack((sunlight, openness), 1)
