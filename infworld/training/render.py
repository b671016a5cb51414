"""Pictures of procedural worlds: rays from camera poses, what they meet, and the light on it.

A picture is traced through all boxes and solids of revolution at once. Light is linear inside this file; the picture's
gamma is 2. Shadows on the ground and how open it lies to the sky are looked up in a map, made once per world.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from infworld.training.pictures import Pictures, look_up
from infworld.training.solids import (
    COLOUR,
    COLUMNS,
    COS,
    GLOW,
    HALF,
    HIGH,
    HX,
    HY,
    LOW,
    MARK,
    N_BOXES,
    Q0,
    Q1,
    Q2,
    SHADED,
    SIN,
    SX,
    SY,
    H,
    X,
    Y,
    Z,
)
from infworld.training.worlds import EYE_HEIGHT, FIELD_OF_VIEW, RIDGE_SAMPLES, Worlds, clearance

if TYPE_CHECKING:
    from infworld.training.stages import Skins

MAP_SIZE, MAP_EXTENT = 200, 10.0  # the ground light map covers [-extent, extent]^2
_FAR = 1e4
_TINY = 1e-7
_INDEX_BITS = 63  # a hit distance carries its solid's index (< 64) in its lowest bits, so one minimum finds both


def render(
    worlds: Worlds,
    poses: Tensor,
    height: int = 96,
    width: int = 128,
    supersample: int = 2,
    compile: bool = False,
    skins: Skins | None = None,
    pictures: Pictures | None = None,
) -> Tensor:
    """Frames seen from poses.

    Args: poses: (W, T, 4) on the worlds' device. supersample: rays per pixel and direction. compile: through
    `torch.compile`, for long runs, as it starts slowly. skins: textures, skies and fields of view, of `pictures`.
    Returns: (W, T, height, width, 3) uint8.
    Raises: ValueError for poses of another shape or device.
    """
    if poses.dim() != 3 or len(poses) != len(worlds) or poses.shape[-1] != 4:
        raise ValueError(f"poses {tuple(poses.shape)} for {len(worlds)} worlds: expected (W, T, 4)")
    if poses.device != worlds.sun.device:
        raise ValueError(f"poses on {poses.device}, worlds on {worlds.sun.device}: move one of them")
    light = _ground_light(worlds)
    # Eager rendering meets only the solids in sight of a strip of the picture; skins change what is in sight.
    strips = 1 if compile or skins else next(n for n in (4, 2, 1) if width % n == 0)
    rays = pixel_rays(height, width, supersample, strips, poses.device)
    scene = (worlds.solids, worlds.sun, worlds.tints, worlds.ground, worlds.ridge, worlds.haze, light)
    skin = (skins.zoom, skins.ground, skins.solids, skins.sky, skins.room) if skins else ()
    atlases = (pictures.textures, pictures.skies) if skins else ()
    texels = tuple((atlas.texels, atlas.size) for atlas in atlases)

    def colours(some: Tensor, pose: Tensor, compiled) -> Tensor:
        seen, worn = (tuple(part[some] for part in parts) for parts in (scene, skin))
        parts = []
        for strip in rays:
            near = None if strips == 1 else _visible_solids(seen[0], pose, strip)
            colour = compiled(_trace)(seen, pose, strip, near, worn, texels)
            parts.append(colour.unflatten(2, (height * supersample, -1)))
        return torch.cat(parts, 3).flatten(2)

    return in_batches(colours, poses, (height, width), supersample, compile)


def in_batches(
    colours: Callable[..., Tensor], poses: Tensor, size: tuple[int, int], supersample: int, compile: bool
) -> Tensor:
    """Frames (W, T, height, width, 3) uint8 for poses (W, T, 4), some of them at a time.

    Args: colours: gives the linear light (F, 3, rays), row by row, for the numbers of F worlds, their poses (F, 4) and
    a function that compiles another one, or does not.
    """
    count, frames = poses.shape[:2]
    world = torch.arange(count, device=poses.device).repeat_interleave(frames)
    flat = poses.reshape(-1, 4)
    step = _chunk_size(poses.device, size[0] * size[1] * supersample**2, compile)
    pictures = []
    for start in range(0, len(flat), step):
        index = torch.arange(start, start + step, device=poses.device).clamp(max=len(flat) - 1)
        index = index if compile else index.unique()  # compiled code wants one shape: its last chunk repeats a frame
        colour = colours(world[index], flat[index], _compiled if compile else lambda function: function)
        pictures.append(_to_picture(colour, *size, supersample)[: len(flat) - start])
    return torch.cat(pictures).reshape(count, frames, *size, 3)


@lru_cache(maxsize=4)
def _compiled(function):
    return torch.compile(function, dynamic=False)


def _chunk_size(device: torch.device, rays: int, compile: bool) -> int:
    """Frames at a time: a few GB of GPU memory, or what keeps a CPU's cache warm."""
    budget = (12_000_000 if compile else 5_000_000) if device.type == "cuda" else 50_000
    return max(1, budget // rays)


def pixel_rays(height: int, width: int, supersample: int, strips: int, device: torch.device) -> Tensor:
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


def _trace(scene: tuple[Tensor, ...], pose: Tensor, rays: Tensor, near, skin: tuple[Tensor, ...], texels) -> Tensor:
    """Linear light along every ray.

    Args: scene: solids, sun, tints, ground, ridge, haze and light map of each frame's world, (F, ...). pose: (F, 4).
    rays: (R, 2). near: indices from `_visible_solids`, or None for all solids. skin: of each frame's world, the fields
    of `Skins` in the order of `render`; texels: those of textures and skies, with their sizes; or nothing of both.
    Returns: (F, 3, R).
    """
    solids, sun, tints, ground, ridge, haze, light = scene
    if skin:
        zoom, ground_skin, solid_skin, sky_skin, room = skin
        rays = rays * zoom[:, None, None]
    origin, ray = camera(pose, rays)
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
    paint = ground_paint = None
    if skin:
        pixel = _ray_spacing(rays)
        textures, skies = texels
        sky, fog = _panorama(sky_skin, skies, ray, pixel, sky, fog)
        solid_skin = solid_skin.transpose(1, 2).gather(2, index[:, None].expand(-1, 3, -1)).unbind(1)
        paint = partial(_paint, solid_skin, textures, pixel)
        ground_paint = partial(_paint, ground_skin[:, :, None].unbind(1), textures, pixel)
        haze = torch.where(room[:, 0] < 100, 1e3, haze)
    solid, is_cloud = _shade_solid(solids, index, origin, ray, distance, sunward, tint, paint)
    floor = _shade_ground(ground, light, origin, ray, down, tint, ground_paint)
    if skin:
        wall, there = _shade_room(room, textures, pixel, origin, ray, tint)
        down = torch.minimum(down, there)
        floor = torch.where((there <= down)[:, None], wall, floor)
    hit = torch.minimum(distance, down)
    surface = torch.where((distance < down)[:, None], solid, floor)
    depth = torch.where(is_cloud & (distance < down), 0.5, hit / haze[:, None])
    clear = torch.exp(-depth * depth)[:, None]
    return torch.where((hit < 0.5 * _FAR)[:, None], fog + (surface - fog) * clear, sky)


def camera(pose: Tensor, rays: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Eye (F, 1) and unit directions (F, R), x y z each."""
    x, y, yaw, pitch = pose[..., None].unbind(1)
    right, up = rays.unbind(-1)  # (R,), or (F, R) where cameras differ
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


def _shade_solid(
    solids: Tensor, index: Tensor, origin, ray, distance: Tensor, sunward, tint, paint
) -> tuple[Tensor, Tensor]:
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
    if paint:
        u, v = _on_surface(solid, index < N_BOXES, normal, local_x, local_y, low, across)
        slant = sum(n * r for n, r in zip(normal, ray, strict=True)).abs()
        albedo = paint(albedo, u, v, distance, slant)
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


def _shade_ground(ground: Tensor, light: Tensor, origin, ray, down: Tensor, tint: Sequence[Tensor], paint) -> Tensor:
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
    if paint:
        colour = paint(colour, x, y, distance, ray[2].abs())
    sunlight, shade = _read_light(light, x, y)
    return colour * (tint[3] * sunlight[:, None] + tint[4] * shade[:, None])


def _ray_spacing(rays: Tensor) -> Tensor:
    """Tangent between neighbouring rays (F, R, 2) of a row, (F, 1)."""
    return rays[:, 1:2, 0] - rays[:, :1, 0]


def _paint(skin: Sequence[Tensor], textures, pixel: Tensor, colour: Tensor, u, v, distance, slant) -> Tensor:
    """A surface's colour (F, 3, R) under its texture: in the texture's own colours, or darker and lighter by them.

    skin: texture (-1: none), units that it covers, share of its own colour. u, v: units on the surface. slant: cosine
    between its normal and the ray.
    """
    number, units, own = skin
    texels, size = textures
    lod = torch.log2(pixel * distance * size[0] / (units * slant.clamp(min=0.05).sqrt()))
    drawn = look_up(texels, size, number.clamp(min=0).long(), u / units, v / units, lod)
    light = drawn.mean(1, keepdim=True) * 3
    painted = drawn * own[:, None] + colour * light.clamp(max=1.5) * (1 - own)[:, None]
    return torch.where((number >= 0)[:, None], painted, colour)


def _on_surface(solid, is_box: Tensor, normal, local_x, local_y, low, across) -> tuple[Tensor, Tensor]:
    """Places on the surface of solids in units, so that a texture lies straight on walls and roofs."""
    on_x = across == local_y.abs()
    side = torch.where(on_x, local_y, local_x)
    flat = normal[2].abs() > 0.95
    box_v = torch.where(flat, torch.where(on_x, local_x, local_y), low)
    around = torch.atan2(local_y, local_x) * solid[HX].clamp(min=0.1)
    return torch.where(is_box, side, around), torch.where(is_box, box_v, low)


def _panorama(skin: Tensor, skies, ray, pixel: Tensor, sky: Tensor, fog: Tensor) -> tuple[Tensor, Tensor]:
    """Sky and haze (F, 3, R) of a panorama that covers elevations of 45 to -45 degrees, where a world has one."""
    number, turn = skin[:, :, None].unbind(1)
    texels, size = skies
    u = torch.atan2(ray[1], ray[0]) / (-2 * math.pi) + turn
    v = (0.5 - torch.asin(ray[2].clamp(-1, 1)) / (math.pi / 2)).clamp(0.5 / size[0], 1 - 0.5 / size[0])
    lod = torch.log2(pixel * size[1] / (2 * math.pi)).expand_as(u)
    picture = number.clamp(min=0).long()
    seen = look_up(texels, size, picture, u, v, lod)
    horizon = look_up(texels, size, picture, u, 0 * v + 0.49, lod + 4)
    has = (number >= 0)[:, None]
    return torch.where(has, seen, sky), torch.where(has, horizon, fog)


def _shade_room(room: Tensor, textures, pixel: Tensor, origin, ray, tint) -> tuple[Tensor, Tensor]:
    """Light (F, 3, R) from a room's walls and ceiling, and how far away they are (F, R)."""
    half_x, half_y, high, wall, ceiling, units, light = room[:, :, None].unbind(1)
    to_x = (half_x - origin[0] * ray[0].sign()) / ray[0].abs().clamp(min=_TINY)
    to_y = (half_y - origin[1] * ray[1].sign()) / ray[1].abs().clamp(min=_TINY)
    to_top = torch.where(ray[2] > 0, (high - EYE_HEIGHT) / ray[2].clamp(min=_TINY), _FAR)
    away = torch.minimum(torch.minimum(to_x, to_y), to_top)
    x, y, z = (o + away * r for o, r in zip(origin, ray, strict=True))
    above, on_x = away == to_top, away == to_x
    slant = torch.where(above, ray[2], torch.where(on_x, ray[0], ray[1])).abs()
    u, v = torch.where(on_x & ~above, y, x), torch.where(above, y, -z)
    number = torch.where(above, ceiling, wall)
    colour = _paint(
        (number, units, torch.ones_like(units)), textures, pixel, tint[5].expand(-1, -1, 1), u, v, away, slant
    )
    shade = light * torch.where(above, 0.9, torch.where(on_x, 1.0, 0.8))
    return colour * shade[:, None], torch.where(half_x < 100, away, _FAR)


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
