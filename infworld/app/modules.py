"""Puts the ES modules of `static/` into Gradio components, whose `js_on_load` is the body of a function.

The modules travel inside the page and are imported from blob addresses. So they need no route, no path that a proxy
could change, and no second request that could fail or meet an older version in the browser's cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gradio as gr

STATIC = Path(__file__).resolve().parent / "static"

_IMPORT = re.compile(r' from "\./([^"]+)";$', re.MULTILINE)
_LOADER = """
const addresses = {};
const link = (_, name) => ` from "${addresses[name]}";`;
for (const [name, text] of modules) {
  const linked = text.replace(/ from "\\.\\/([^"]+)";$/gm, link) + `\\n//# sourceURL=${name}`;
  addresses[name] = URL.createObjectURL(new Blob([linked], { type: "text/javascript" }));
}
import(addresses[modules.at(-1)[0]])
  .then(({ start }) => start({ element, props, trigger, watch }, initial))
  .finally(() => Object.values(addresses).forEach(URL.revokeObjectURL));
"""


def read_static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


class ModuleHTML(gr.HTML):
    """Shows `static/NAME.html` with NAME.css, and calls `start({element, props, trigger, watch}, initial)` of the
    module NAME.js, which may trigger the events of `TRIGGERS`.

    initial: anything for JSON.
    """

    TRIGGERS: tuple[str, ...] = ()

    def __init__(self, name: str, initial: Any = None, **kwargs: Any):
        super().__init__(
            html_template=read_static(f"{name}.html"),
            css_template=read_static(f"{name}.css"),
            js_on_load=_script(f"{name}.js", initial, self.TRIGGERS),
            apply_default_css=False,
            **kwargs,
        )

    def __getattr__(self, name: str) -> Any:
        """The listener of an event. For any other name, of which it asks at every update, Gradio would search the whole
        script."""
        if name not in type(self).TRIGGERS:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return super().__getattr__(name)


def _script(entry: str, initial: Any, events: Iterable[str]) -> str:
    """The `js_on_load` that calls a module's `start`. Gradio looks for the events' names in the text."""
    constants = {"initial": initial, "modules": _tree(entry), "events": list(events)}
    return "".join(f"const {name} = {json.dumps(value)};\n" for name, value in constants.items()) + _LOADER


def _tree(entry: str) -> list[tuple[str, str]]:
    """Names and texts of a module and of all that it imports, each after those that it needs."""
    found: dict[str, str] = {}

    def visit(name: str) -> None:
        text = read_static(name)
        for needed in _IMPORT.findall(text):
            if needed not in found:
                visit(needed)
        found[name] = text

    visit(entry)
    return list(found.items())
