"""The screen of the page: shows the picture, then plays the film while it is made, piece by piece.

Unlike `gr.Video(streaming=True)` it needs no ffmpeg or ffprobe on the server's PATH, and the film can grow, lose its
last piece and grow again at any time without the player starting anew.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from infworld.app.films import Film
from infworld.app.modules import read_static

_HTML, _CSS, _JS = (read_static(f"player.{kind}") for kind in ("html", "css", "js"))


def still_of(picture: Image.Image) -> str:
    """The address of a picture that is in the address itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def still_value(picture: Image.Image) -> dict[str, Any]:
    """The player's value that shows a picture."""
    return {"still": still_of(picture)}


def film_value(film: Film, complete: Path | None = None) -> dict[str, Any]:
    """The player's value that plays a film; `complete`: all of it in one file, when nothing more comes for now."""
    pieces = [{"path": str(piece.path), "frames": piece.frames} for piece in film.pieces()]
    return {"pieces": pieces, "fps": film.fps, "complete": complete and str(complete)}


class FilmPlayer(gr.HTML):
    """Value: what `still_value` or `film_value` makes, or None. The paths must be readable through `allowed_paths`."""

    def __init__(self, value: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(
            value=value, html_template=_HTML, css_template=_CSS, js_on_load=_JS, apply_default_css=False, **kwargs
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}
