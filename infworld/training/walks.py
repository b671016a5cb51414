"""What the camera does in a training clip: action sequences that come back to what they have seen.

A walk is built from segments (move, view, frames), indices of spec section 3, and cut to length. `worlds.walk`
turns the actions into poses. A memory can only be learned where a view returns, so most kinds return; `revisits` finds
where.
"""

import math
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from infworld.training.worlds import FIELD_OF_VIEW, TURN, VIEW_DIRECTIONS

Segment = tuple[int, int, int]

STILL, FORWARD, BACK = 0, 1, 2
UP, DOWN, LEFT, RIGHT = 1, 2, 3, 4
OPPOSITE_MOVE = (0, 2, 1, 4, 3, 8, 7, 6, 5, 9)
OPPOSITE_VIEW = (0, 2, 1, 4, 3, 8, 7, 6, 5, 9)
QUARTER = round(math.pi / 2 / TURN)  # frames: 80
CIRCLE = 4 * QUARTER
MAX_PITCH_FRAMES = 24  # random looks up and down stay within this many frames of level, clear of the pitch limit

_VIEW_RISE = tuple(int(up) for _, up in VIEW_DIRECTIONS)


def _pause(rng: random.Random, most: int = 24) -> list[Segment]:
    return [(STILL, STILL, rng.randint(4, most))] if rng.random() < 0.5 else []


def _turn_return(rng: random.Random) -> list[Segment]:
    """Turn, perhaps wait, turn back."""
    side, frames = rng.choice((LEFT, RIGHT)), rng.randint(16, 2 * QUARTER)
    return [(STILL, side, frames), *_pause(rng), (STILL, OPPOSITE_VIEW[side], frames), *_pause(rng)]


def _long_turn(rng: random.Random) -> list[Segment]:
    """Half a circle to one and a half, one way."""
    return [(STILL, rng.choice((LEFT, RIGHT)), rng.randint(CIRCLE // 2, CIRCLE * 3 // 2)), *_pause(rng)]


def _circle(rng: random.Random) -> list[Segment]:
    return [(STILL, rng.choice((LEFT, RIGHT)), CIRCLE), *_pause(rng)]


def _go_return(rng: random.Random) -> list[Segment]:
    """Forward and back again, walking backwards or turning about."""
    frames = rng.randint(24, 90)
    if rng.random() < 0.5:
        return [(FORWARD, STILL, frames), *_pause(rng), (BACK, STILL, frames), *_pause(rng)]
    about = (STILL, rng.choice((LEFT, RIGHT)), 2 * QUARTER)
    return [(FORWARD, STILL, frames), about, (FORWARD, STILL, frames), about, *_pause(rng)]


def _loop(rng: random.Random) -> list[Segment]:
    """Once round a square."""
    side, frames = rng.choice((LEFT, RIGHT)), rng.randint(24, 75)
    return [(FORWARD, STILL, frames), (STILL, side, QUARTER)] * 4 + _pause(rng)


def _retrace(rng: random.Random) -> list[Segment]:
    """A few segments, then their opposites in reverse order."""
    way = []
    for _ in range(rng.randint(2, 5)):
        if rng.random() < 0.5:
            way.append((rng.choice((1, 1, 1, 2, 3, 4, 5, 6)), STILL, rng.randint(16, 60)))
        else:
            way.append((rng.choice((0, 0, 1)), rng.choice((LEFT, RIGHT)), rng.randint(16, 90)))
    return way + _pause(rng) + inverse(way) + _pause(rng)


def _far_return(rng: random.Random) -> list[Segment]:
    """Away from a place, long elsewhere and back there, and to the place again by the same way."""
    side = rng.choice((LEFT, RIGHT))
    away = [(STILL, side, rng.randint(QUARTER // 2, 2 * QUARTER))]
    if rng.random() < 0.5:
        away.append((FORWARD, STILL, rng.randint(24, 90)))
    elsewhere: list[tuple[int, int, int]] = []
    long = rng.randint(240, 640)
    while sum(segment[2] for segment in elsewhere) < long:
        elsewhere += rng.choice((_retrace, _go_return, _turn_return))(rng)
    return away + elsewhere + inverse(away) + _pause(rng)


def inverse(segments: list[Segment]) -> list[Segment]:
    """The segments that undo `segments`, as long as nothing was bumped into."""
    return [(OPPOSITE_MOVE[move], OPPOSITE_VIEW[view], frames) for move, view, frames in reversed(segments)]


def _look(rng: random.Random) -> list[Segment]:
    """Random views from one place, up and down as well, level in the end."""
    return _random_segments(rng, moves=(STILL,), views=(0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8))


def _random(rng: random.Random) -> list[Segment]:
    """Random moves, views and both at once."""
    return _random_segments(
        rng, moves=(0, 0, 0, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8), views=(0, 0, 0, 1, 2, 3, 3, 4, 4, 5, 6, 7, 8)
    )


def _random_segments(rng: random.Random, moves: tuple[int, ...], views: tuple[int, ...]) -> list[Segment]:
    segments, pitch = [], 0
    for _ in range(6):
        move, view, frames = rng.choice(moves), rng.choice(views), rng.randint(12, 90)
        if _VIEW_RISE[view]:
            frames = min(frames, MAX_PITCH_FRAMES)
            if abs(pitch + frames * _VIEW_RISE[view]) > MAX_PITCH_FRAMES:
                view = OPPOSITE_VIEW[view]
                frames = min(frames, abs(pitch))
            pitch += frames * _VIEW_RISE[view]
        segments.append((move, view, frames))
    return segments + ([(STILL, DOWN if pitch > 0 else UP, abs(pitch))] if pitch else [])


KINDS: dict[str, Callable[[random.Random], list[Segment]]] = {
    "random": _random,
    "look": _look,
    "turn_return": _turn_return,
    "long_turn": _long_turn,
    "circle": _circle,
    "go_return": _go_return,
    "loop": _loop,
    "retrace": _retrace,
    "far_return": _far_return,
}

VIEW_ONLY = {"turn_return": 0.55, "look": 0.15, "long_turn": 0.15, "circle": 0.15}
MIXED = {
    "random": 0.20,
    "look": 0.06,
    "turn_return": 0.18,
    "long_turn": 0.05,
    "circle": 0.08,
    "go_return": 0.16,
    "loop": 0.06,
    "retrace": 0.11,
    "far_return": 0.10,
}


def sample_actions(
    mixture: Mapping[str, float], count: int, frames: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random action sequences; each walk is of one kind, repeated with fresh lengths until it is long enough.

    Args: mixture: kind -> weight (names of `KINDS`). generator: a CPU generator; the same state gives the same actions.
    Returns: move, view: (count, frames) int64 on the CPU.
    Raises: ValueError for an unknown kind.
    """
    unknown = set(mixture) - set(KINDS)
    if unknown:
        raise ValueError(f"unknown kinds of walk {sorted(unknown)}: known are {sorted(KINDS)}")
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    kinds = rng.choices(list(mixture), weights=list(mixture.values()), k=count)
    walks = torch.stack([_fill(KINDS[kind], frames, rng) for kind in kinds]) if count else torch.empty(0, 2, frames)
    return walks[:, 0].long(), walks[:, 1].long()


def _fill(kind: Callable[[random.Random], list[Segment]], frames: int, rng: random.Random) -> Tensor:
    """(2, frames): move and view of one walk."""
    segments, total = [], 0
    while total < frames:
        more = kind(rng)
        segments += more
        total += sum(segment[2] for segment in more)
    return expand(segments)[:, :frames]


def expand(segments: list[Segment]) -> Tensor:
    """Segments -> (2, T) int64: the move and the view of every frame."""
    table = torch.tensor(segments)
    return table[:, :2].repeat_interleave(table[:, 2], dim=0).T


def revisits(poses: Tensor, near: float = 0.4, aside: float = FIELD_OF_VIEW / 2) -> Tensor:
    """For every frame the last earlier frame that saw much of the same and went out of sight in between, or -1.

    Saw the same: from within `near` units, the view at most `aside` radians of yaw apart. Out of sight: turned by more
    than half the field of view or 1.5 units away. Such a frame cannot be drawn from the frames just before it: it needs
    a memory.

    Args: poses: (W, T, 4). Returns: (W, T) int64, on the poses' device.
    """
    return torch.stack([_revisits_of(pose, near, aside) for pose in poses])


def _revisits_of(pose: Tensor, near: float, aside: float) -> Tensor:
    apart = torch.cdist(pose[:, :2], pose[:, :2])
    turned = ((pose[:, None, 2] - pose[None, :, 2] + math.pi).remainder(2 * math.pi) - math.pi).abs()
    frames = torch.arange(len(pose), device=pose.device)
    earlier = frames[None, :] < frames[:, None]
    same = (apart < near) & (turned < aside) & earlier
    gone = ((apart > 1.5) | (turned > FIELD_OF_VIEW / 2)) & earlier
    last_gone = torch.where(gone, frames, -1).amax(1, keepdim=True)
    return torch.where(same & (frames[None, :] < last_gone), frames, -1).amax(1)
