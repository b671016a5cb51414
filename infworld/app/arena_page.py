"""The arena as a page of its own (`infworld arena`), and as another page of the app (`infworld serve --arena`)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from infworld.app.arena import arena
from infworld.app.guard import Guard, Stored
from infworld.app.server import hosts_of, raise_open_files, theme
from infworld.arena.hall import Hall
from infworld.arena.hub_votes import open_votes
from infworld.arena.matches import Matches

INTRODUCTION = """# Which film is better?
Two films of the same picture and actions. Keys: **1** left, **2** no difference, **3** right."""


@contextmanager
def open_hall(films: Path, votes: str | Path | None = None) -> Iterator[Hall]:
    """The films of a folder, with their votes (`open_votes`); the copies of films that are shown end with it."""
    matches = Matches.read(films)
    with open_votes(films, votes) as kept, tempfile.TemporaryDirectory(prefix="infworld-arena-") as stage:
        yield Hall(matches, kept, stage)


def add_arena(blocks: gr.Blocks, hall: Hall) -> None:
    """Another page of the app, at /arena."""
    with blocks.route("Arena", "/arena"):
        gr.Markdown(INTRODUCTION)
        arena(hall)


def launch(hall: Hall, **launching: Any) -> gr.Blocks:
    """Builds and launches a page with the arena alone. Returns the running page."""
    with gr.Blocks(title="Infinite-World: the arena", fill_width=True) as blocks:
        gr.Markdown(INTRODUCTION)
        arena(hall)
    guard = Middleware(
        Guard,
        hosts=hosts_of(launching.get("server_name"), ()),
        upload=0,  # nobody has anything to upload
        stored=Stored(0, 0),
        connections=raise_open_files() // 2,
    )
    blocks.launch(
        theme=theme(),
        allowed_paths=[str(hall.stage)],
        app_kwargs={"middleware": [guard]},
        ssr_mode=False,
        footer_links=["settings"],
        **launching,
    )
    return blocks
