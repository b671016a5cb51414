"""The part of the page that plays a walk: its frames as they come, the keys that steer it, the map."""

from __future__ import annotations

import base64
from typing import Any

from infworld.app.editor import VOCABULARY
from infworld.app.modules import ModuleHTML
from infworld.app.runner import COLUMNS, Strip
from infworld.camera import motion
from infworld.config import CameraConfig


def playing(
    number: int,
    strips: list[Strip],
    says: str,
    film: list[list[int]] | None = None,
    seconds_left: float | None = None,
) -> dict[str, Any]:
    """The value of a walk that goes on, or waits for its turn. number: of the run, which begins with no frames; film:
    the [move, view, frames] before it."""
    return {
        "run": number,
        "film": film or [],
        "says": says,
        "seconds_left": seconds_left,
        # By number, so that Gradio sends only what is new of it.
        "strips": {str(strip.number): _sent(strip) for strip in strips},
        "over": False,
    }


def resting(says: str, film: list[list[int]] | None, frame: str | None = None) -> dict[str, Any]:
    """The value when nothing is played. film: the [move, view, frames] of the film that can be walked on, None where
    there is none. frame: address of the picture to show, None to leave what is shown."""
    return {"says": says, "strips": {}, "over": True, "film": film, "frame": frame}


def _sent(strip: Strip) -> dict[str, Any]:
    return {
        "jpeg": base64.b64encode(strip.jpeg).decode(),
        "size": strip.size,
        "frames": strip.frames,
        "lasts": strip.lasts,
        "steered": strip.steered,
        "actions": strip.actions,
    }


class PlayScreen(ModuleHTML):
    """Value: what `playing` or `resting` makes, or None.

    Events: `begin` and `go_on` (a walk from the picture; of the film that is there), `steer` with a message for
    `Steering.of_message` as its data, `leave`.
    """

    TRIGGERS = ("begin", "go_on", "steer", "leave")

    def __init__(self, *, fps: int, camera: CameraConfig, chunk_frames: int, **kwargs: Any):
        initial = {
            **VOCABULARY,
            "motion": motion(camera),
            "fps": fps,
            "chunk_frames": chunk_frames,
            "columns": COLUMNS,
        }
        super().__init__("play", initial, value=None, **kwargs)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
