"""What visitors send: uploaded files, and the arguments of programs. It comes from a browser and may be anything."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.exceptions import InvalidPathError
from gradio.queueing import Queue
from gradio.utils import get_upload_folder
from pydantic import ValidationError

from infworld.actions import ActionScript

NOT_UPLOADED = "This file was not uploaded to this server, or has expired: upload it again."


CLOSING = 0.05  # seconds until a client knows that its stream of messages has ended


class CheckedBlocks(gr.Blocks):
    """Blocks that say what is wrong with an input, which Gradio hides, lose no event, and end what works for them
    (`workers`) when they are closed."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.workers = ExitStack()

    def close(self, verbose: bool = True) -> None:
        super().close(verbose)
        self.workers.close()

    def queue(self, *args: Any, **kwargs: Any) -> gr.Blocks:
        super().queue(*args, **kwargs)
        self._queue.push = answering_late(self._queue)  # type: ignore[method-assign, assignment]
        return self

    async def preprocess_data(self, *args: Any, **kwargs: Any) -> list[Any]:
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            raise gr.Error(escape(error.message, quote=False), print_exception=False) from error
        except (ValidationError, InvalidPathError) as error:  # of a file: nothing else has a data model here
            raise gr.Error(NOT_UPLOADED, print_exception=False) from error
        except Exception as error:
            raise gr.Error(escape(f"An input cannot be used: {error}", quote=False), print_exception=False) from error


def answering_late(queue: Queue) -> Callable[..., Awaitable[Any]]:
    """The queue's `push`, which answers an event that finds no other of its page a little later than Gradio's.

    When a page's last event is over, Gradio ends the stream of its messages. A client that fires its next event at that
    moment, and is answered before it hears of the end, takes the stream for open and never hears of the event.
    """
    push = queue.push

    async def push_late(body: Any, **options: Any) -> Any:
        known = body.session_hash in queue.pending_messages_per_session
        alone = known and not queue.pending_event_ids_session.get(body.session_hash)
        answer = await push(body=body, **options)
        if alone:
            await asyncio.sleep(CLOSING)
        return answer

    return push_late


# --------------------------------------------------------------------------------------------------------------- files


def uploaded(payload: Any) -> str | None:
    """The path of an uploaded file, from what a component is sent. gr.Error, which does not say what else is there, for
    a path outside of this server's folder of uploads.

    Gradio itself checks only what bears its mark of a file.
    """
    if payload is None:
        return None
    path = Path(payload.path or "").resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise gr.Error(NOT_UPLOADED, print_exception=False)
    os.utime(path)  # in use, so that it is kept from now on
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


# ----------------------------------------------------------------------------------------------- arguments of programs


class Argument(gr.Textbox):
    """A program's argument, left as it was sent for the functions below. kinds: its JSON types, for the description."""

    is_template = True

    def __init__(self, value: Any = "", *, label: str, kinds: tuple[str, ...] = ("string",)):
        super().__init__(value, label=label)
        self.kinds = kinds

    def preprocess(self, payload: Any) -> Any:
        return payload

    def postprocess(self, value: Any) -> Any:
        return value

    def api_info(self) -> dict[str, Any]:
        types = [{"type": kind} | ({"items": {}} if kind == "array" else {}) for kind in self.kinds]
        return types[0] if len(types) == 1 else {"anyOf": types}


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {_shown(value)}")
    return value


def whole_number(name: str, value: Any) -> int:
    """An int, a float without a fraction, or either as text."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,20}(\.0*)?\s*", value):
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if type(value) is not int:
        raise ValueError(f"{name} must be a whole number, not {_shown(value)}")
    return value


def script(value: Any) -> ActionScript:
    """From text, a list in the exchange format, or such a list as JSON text. Not from a path, which would be one on the
    server."""
    if isinstance(value, list):
        return ActionScript.from_list(value)
    if not isinstance(value, str):
        raise ValueError(f"actions must be text or a list, not {_shown(value)}")
    return ActionScript.from_json(value) if value.lstrip().startswith(("[", "{")) else ActionScript.parse(value)


def _shown(value: Any) -> str:
    """A value as the program wrote it, in JSON, cut short."""
    try:
        words = json.dumps(value)
    except (TypeError, ValueError):
        words = repr(value)
    return words if len(words) <= 80 else f"{words[:80]}..."
