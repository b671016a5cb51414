"""Driving: a part of the page that turns keys held while the film plays into the actions of its next chunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from infworld.actions import ActionScript
from infworld.app.editor import KEYS

_HERE = Path(__file__).parent
_HTML, _CSS, _JS = ((_HERE / "static" / f"drive.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))


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
        settings = {"keys": KEYS, "chunk": chunk_frames, "fps": fps, "film": film}
        super().__init__(
            value=None,
            html_template=_HTML,
            css_template=_CSS,
            js_on_load=f"const settings = {json.dumps(settings)};\n{_JS}",
            apply_default_css=False,
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
