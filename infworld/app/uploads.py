"""Files that a visitor sends: pictures and session files. Their paths come from a browser and may name anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder


def uploaded(payload: Any) -> str | None:
    """The path of an uploaded file, from what a component is sent. gr.Error, which does not say what else is there, for
    a path outside of this server's folder of uploads.

    Gradio itself checks only what bears its mark of a file.
    """
    if payload is None:
        return None
    path = Path(payload.path).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise gr.Error(
            "This file was not uploaded to this server, or has expired: upload it again.", print_exception=False
        )
    return str(path)


class Picture(gr.Image):
    """An upload whose reading is left to `infworld.pictures.load_image`, which says what is wrong with a picture."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return uploaded(payload)


class SessionUpload(gr.UploadButton):
    """A button that uploads a session file."""

    is_template = True

    def preprocess(self, payload: Any) -> str | None:
        return uploaded(payload)
