"""The upload of a picture."""

from __future__ import annotations

from typing import Any

import gradio as gr


class Picture(gr.Image):
    """An upload whose reading is left to `infworld.pictures.load_image`, which says what is wrong with a picture."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path
