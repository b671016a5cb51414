"""Infinite-World: give it one picture and a list of actions, and it films the walk.

world = infworld.load("tiny")
for chunk in world.rollout("picture.png", "forward 80, right 80", num_frames=161):
    chunk.frames  # uint8, T H W 3
"""

from typing import TYPE_CHECKING

from infworld.actions import ActionScript, Segment

if TYPE_CHECKING:
    from infworld.rollout import Chunk, Progress, Session, World, load

__all__ = ["ActionScript", "Chunk", "Progress", "Segment", "Session", "World", "load"]


def __getattr__(name: str):
    """The engine needs torch, which takes seconds to import: only when it is first asked for."""
    if name in __all__:
        from infworld import rollout

        return getattr(rollout, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
