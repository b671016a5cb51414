"""The pictures to begin with, as one row: one's own, and the example scenes by name."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from infworld.actions import ActionScript
from infworld.picture_files import SUFFIXES

THUMBNAIL = (200, 150)  # pixels

_CSS = """
.gallery { display: flex; gap: 0.5rem; align-items: start; overflow-x: auto; padding: 3px; }
button { flex: 0 0 6.6rem; width: 6.6rem; padding: 0; border: 0; font-size: 0.75rem; line-height: 1.25; }
button { text-align: center; color: var(--body-text-color-subdued); background: none; cursor: pointer; }
img, .plus { display: grid; width: 100%; margin: 0 0 0.2rem; aspect-ratio: 4 / 3; border-radius: 0.4rem; }
img { object-fit: cover; }
.plus { place-items: center; font-size: 1.6rem; border: 1px dashed var(--border-color-primary); }
button:hover > :first-child, button:focus-visible > :first-child { outline: 2px solid var(--color-accent); }
@media (max-width: 640px) { button { flex-basis: 4.6rem; width: 4.6rem; } }
"""
_JS = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.index) trigger("pick", { index: Number(button.dataset.index) });
  else if (button) document.querySelector(button.dataset.upload)?.click();
});
"""


@dataclass(frozen=True)
class Example:
    """A scene to begin with, from the files `NAME.png` (or .jpg, .webp), `NAME.json` and, for a prompt, `NAME.txt`."""

    picture: Path
    actions: ActionScript
    prompt: str

    @property
    def title(self) -> str:
        """The file's name in words, without the number that sorts it."""
        return self.picture.stem.lstrip("0123456789-_ ").replace("-", " ").replace("_", " ").capitalize()


def find_examples(folder: Path) -> list[Example]:
    """The examples in a folder, in order of the numbers before their names, then of their names."""
    examples = []
    for picture in sorted((path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES), key=_order):
        actions, prompt = picture.with_suffix(".json"), picture.with_suffix(".txt")
        if actions.is_file():
            words = prompt.read_text(encoding="utf-8").strip() if prompt.is_file() else ""
            examples.append(Example(picture, ActionScript.read(actions), words))
    return examples


def _order(picture: Path) -> tuple[int, str]:
    number = picture.stem.partition("-")[0]
    return int(number) if number.isdecimal() else 0, picture.stem


class Gallery(gr.HTML):
    """Event: `pick`, with the example's place in the list as `index` of the event's data.

    opens: CSS selector of the file input that the first button, for a picture of one's own, opens.
    """

    def __init__(self, examples: list[Example], *, opens: str, **kwargs: Any):
        own = f'<button type="button" data-upload="{escape(opens)}"><span class="plus">+</span>Your picture</button>'
        buttons = own + "".join(_button(index, example) for index, example in enumerate(examples))
        super().__init__(
            html_template=f'<div class="gallery" role="group" aria-label="Examples">{buttons}</div>',
            css_template=_CSS,
            js_on_load=_JS,
            apply_default_css=False,
            **kwargs,
        )


def _button(index: int, example: Example) -> str:
    with Image.open(example.picture) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail(THUMBNAIL)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = escape(example.title)
    return (
        f'<button type="button" data-index="{index}"><img src="data:image/webp;base64,{data}" alt="">{words}</button>'
    )
