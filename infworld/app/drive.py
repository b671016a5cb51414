"""Driving: a part of the page that turns keys held while the film plays into the actions of its next chunk."""

from __future__ import annotations

from typing import Any

import gradio as gr

from infworld.actions import ActionScript
from infworld.app.editor import VOCABULARY
from infworld.app.modules import module_script, read_static


def driven(value: Any, frames: int) -> ActionScript:
    """The script in a Drive's value, which comes from a browser: at most `frames` frames. ValueError otherwise."""
    if not isinstance(value, dict) or not isinstance(value.get("script"), str) or len(value["script"]) > 100 * frames:
        raise ValueError("what was driven did not arrive")
    script = ActionScript.parse(value["script"])
    if len(script) > frames:
        raise ValueError(f"a chunk has {frames} frames, not {len(script)}")
    return script


class Drive(gr.HTML):
    """Value: `{"script": text, "number": n}` of the last chunk driven (`driven`); None from Python ends the driving.

    Event: `drive`, when a chunk has been driven, or, with an empty script, when there is no film to drive on yet.
    `film` is the CSS selector of the video element.
    """

    def __init__(self, *, chunk_frames: int, fps: int, film: str, **kwargs: Any):
        self.chunk_frames, self.fps, self.film = chunk_frames, fps, film
        initial = {**VOCABULARY, "chunk_frames": chunk_frames, "fps": fps, "film": film}
        super().__init__(
            value=None,
            html_template=read_static("drive.html"),
            css_template=read_static("drive.css"),
            js_on_load=module_script("drive.js", initial, events=("drive",)),
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
