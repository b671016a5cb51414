"""What stands and floats in a procedural world, as boxes and solids of revolution: rows of numbers that rays can meet.

A landmark takes three boxes or two solids of revolution, and leaves footprints that nobody walks into.
"""

import math

import torch
from torch import Tensor

from infworld.training.palettes import palette_tensor, rgb

# Landmarks: radius and height in units, each from, to.
SIZES = {
    "house": ((1.0, 1.45), (1.9, 2.7)),
    "arch": ((1.2, 1.5), (1.8, 2.5)),
    "pyramid": ((1.1, 1.6), (1.7, 2.8)),
    "obelisk": ((0.45, 0.6), (2.6, 3.8)),
    "tower": ((0.5, 0.75), (3.0, 4.6)),
    "dome": ((0.9, 1.5), (1.1, 1.8)),
    "round tree": ((0.7, 1.0), (2.2, 2.9)),
    "tall tree": ((0.65, 0.95), (2.4, 3.6)),
    "mushroom": ((0.8, 1.2), (1.6, 2.3)),
    "rotunda": ((0.9, 1.3), (1.8, 2.4)),
}
KINDS = tuple(SIZES)
BUILT = 6  # landmark slots made of boxes (the first four kinds)
ROUND = 9  # landmark slots made of solids of revolution (the other kinds)
CLOUDS = 3
N_BOXES = BUILT * 3
SHADED = N_BOXES + ROUND * 2 + 2  # solids that cast shadows: those of landmarks and two of a balloon, before the clouds

# Columns of a solid. Boxes: half sizes that shrink by `slope` per unit of height (roofs, pyramids).
# Solids of revolution: radius^2 = q0 + q1 z + q2 z^2 above the base (cylinders, cones, ellipsoids).
X, Y, Z, H, COS, SIN, HX, HY, SX, SY, Q0, Q1, Q2 = range(13)
COLOUR, MARK = 13, 16  # three columns each
LOW, HIGH, HALF, GLOW = 19, 20, 21, 22  # the mark: share of the height from, to; half width in units; own light
COLUMNS = 23


class Draws:
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


def _named_colours(names: str, palette: Tensor, index: Tensor) -> Tensor:
    """Linear RGB of the `index`-th wall, roof or leaf colour (modulo how many there are)."""
    table = palette_tensor(lambda p: [rgb(getattr(p, names)[i % len(getattr(p, names))]) for i in range(12)])
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


def build_boxes(draw: Draws, landmarks: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Houses, arches, pyramids and obelisks: three boxes a landmark and two footprints."""
    kind, shade, x, y, radius, height = landmarks.unbind(-1)
    yaw, lean, style = draw(BUILT, high=math.pi), draw(BUILT), draw(BUILT)
    cos, sin = yaw.cos(), yaw.sin()
    wall = _named_colours("walls", palette, shade)
    other = _named_colours("walls", palette, shade + 1)
    roof = _named_colours("roofs", palette, shade // 3)
    glow = palette_tensor(lambda p: p.glow)[palette][:, None].expand_as(x)
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


def build_rounds(draw: Draws, landmarks: Tensor, palette: Tensor) -> tuple[Tensor, Tensor]:
    """Towers, domes, trees, mushrooms and rotundas: two solids of revolution a landmark and one footprint."""
    kind, shade, x, y, radius, height = landmarks.unbind(-1)
    style = draw(ROUND)
    wall = _named_colours("walls", palette, shade)
    roof = _named_colours("roofs", palette, shade // 3)
    leaf = _named_colours("leaves", palette, shade)
    trunk = torch.tensor(rgb("8a5a3c")).expand_as(wall)
    pale = torch.tensor(rgb("fbeedd")).expand_as(wall)
    glow = palette_tensor(lambda p: p.glow)[palette][:, None].expand_as(x)
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


def build_balloon(draw: Draws, palette: Tensor) -> Tensor:
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
    _set(basket, present, {COLOUR: torch.tensor(rgb("8a5a3c")).expand(len(palette), 1, 3)})
    return torch.cat((envelope, basket), 1)


def build_clouds(draw: Draws, palette: Tensor) -> Tensor:
    """Clouds with flat bottoms high above: a large lump and a smaller one at its side."""
    present = draw(CLOUDS) < 0.75
    distance, azimuth = draw(CLOUDS, low=11.0, high=20.0), draw(CLOUDS, high=2 * math.pi)
    size, level, side = draw(CLOUDS, low=1.8, high=3.0), draw(CLOUDS, low=4.5, high=8.5), draw(CLOUDS, low=-1, high=1)
    white = palette_tensor(lambda p: rgb(p.cloud))[palette][:, None].expand(-1, CLOUDS, 3)
    large, small = _blank(len(palette), CLOUDS), _blank(len(palette), CLOUDS)
    for lump, share, aside in ((large, 1.0, 0.0), (small, 0.66, 1.0)):
        away = azimuth + aside * side.sign() * size / distance
        columns = {X: distance * away.cos(), Y: distance * away.sin(), Z: level, COLOUR: white, GLOW: -1.0}
        _set(lump, present, columns | _ellipsoid(size * share, size * share * 0.42, -0.25))
    return torch.cat((large, small), 1)
