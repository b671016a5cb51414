"""The arena as a page of its own: `infworld arena`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from infworld.app.arena import arena
from infworld.app.server import theme
from infworld.arena.hall import Hall
from infworld.arena.matches import Matches
from infworld.arena.votes import Votes


def launch(matches: Matches, votes: Votes, stage: Path, **launching: Any) -> gr.Blocks:
    """Builds and launches the page; films are copied below `stage` under names that say nothing."""
    hall = Hall(matches, votes, stage)
    with gr.Blocks(title="Infinite-World: the arena", fill_width=True) as blocks:
        gr.Markdown("# Which film is better?\nTwo films of the same picture and actions. Keys: **1** left, **2** no "
                    "difference, **3** right.")  # fmt: skip
        arena(hall)
    blocks.launch(
        theme=theme(), allowed_paths=[str(hall.stage)], ssr_mode=False, footer_links=["settings"], **launching
    )
    return blocks
