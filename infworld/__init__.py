"""Infinite-World: give it one picture and a list of actions, and it films the walk.

world = infworld.load("tiny")
for chunk in world.rollout("picture.png", "forward 80, right 80", num_frames=161):
    chunk.frames  # uint8, T H W 3
"""

import getpass
import importlib
import os
from typing import TYPE_CHECKING

from infworld.actions import ActionScript, Segment

if TYPE_CHECKING:
    from infworld.loading import load
    from infworld.progress import Progress
    from infworld.session import Session
    from infworld.settings import FilmSettings
    from infworld.world import Chunk, World

__version__ = "0.1.0"

try:
    getpass.getuser()
except (KeyError, OSError):  # a container's user without a name, which torch asks for when it builds a module
    os.environ["USER"] = str(os.getuid())

__all__ = ["ActionScript", "Chunk", "FilmSettings", "Progress", "Segment", "Session", "World", "load"]

# The engine needs torch, which takes seconds to import: only when it is first asked for.
_HOMES = {
    **{"Chunk": "world", "FilmSettings": "settings", "Progress": "progress"},
    **{"Session": "session", "World": "world", "load": "loading"},
}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"infworld.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
