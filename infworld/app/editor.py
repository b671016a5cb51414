"""The action editor of the page: timeline, keys, text and map of one script, as a Gradio component.

What the person sees and does is in `editor.html`, `editor.css` and `editor.js`; this file gives them the vocabulary
of `infworld.actions` and checks what comes back. The value is `{"segments": [[move, view, frames], ...]}`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from infworld.actions import MOVE_WORDS, MOVES, VIEW_WORDS, VIEWS, WAIT_WORD, ActionScript, Segment, words
from infworld.app.templates import walk_templates

# What a browser may send; far above the longest film, far below what hurts the server.
MAX_SEGMENTS = 2_000
MAX_FRAMES = 20_000

# KeyboardEvent.code -> word of the text form. Codes name places on the keyboard, so W A S D is a cross on any layout.
KEYS = {
    **{"KeyW": "forward", "KeyS": "back", "KeyA": "strafe left", "KeyD": "strafe right"},
    **{"ArrowUp": "up", "ArrowDown": "down", "ArrowLeft": "left", "ArrowRight": "right"},
}

_HERE = Path(__file__).parent
_HTML, _CSS, _JS = ((_HERE / "static" / f"editor.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))


def value_of(script: ActionScript) -> dict[str, list[list[int]]]:
    """The editor's value that shows `script`."""
    return {"segments": [[s.move, s.view, s.frames] for s in script.segments]}


def script_of(value: Any) -> ActionScript:
    """The script in an editor's value. The value comes from a browser: ValueError for anything malformed or too long.

    None is the empty script. At most MAX_SEGMENTS segments and MAX_FRAMES frames.
    """
    if value is None:
        return ActionScript()
    if not isinstance(value, dict) or not isinstance(value.get("segments"), list):
        raise ValueError('the actions must be {"segments": [[move, view, frames], ...]}')
    segments = value["segments"]
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"at most {MAX_SEGMENTS} segments, not {len(segments)}")
    script = ActionScript(tuple(_segment(segment) for segment in segments))
    if len(script) > MAX_FRAMES:
        raise ValueError(f"at most {MAX_FRAMES} frames of actions, not {len(script)}")
    return script


def _segment(numbers: Any) -> Segment:
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(type(n) is int for n in numbers):
        raise ValueError(f"a segment must be [move, view, frames] in whole numbers, not {str(numbers)[:80]}")
    return Segment(*numbers)


class ActionEditor(gr.HTML):
    """Edits an action script as a timeline, by recorded keys and as text, and draws its path on a map.

    Value: `{"segments": [[move, view, frames], ...]}` (`value_of`, `script_of`). Events: `input` when the person
    edits, `change` when anything does; a recording shows its value at each chunk border and at its end.

    `num_frames`, `horizon_frames`, `chunk_frames`, `turn_degrees`, `step_units` and `frame` may be updated with
    `gr.update`. num_frames: frames of the film (None: not known); horizon_frames: longest film the model was trained
    for (None: unlimited); chunk_frames: frames per chunk, fps: frames per second; turn_degrees, step_units: what one
    frame of turning and of walking does on the map; frame: the current moment of the film. `follow` is a CSS selector
    of a video element whose playing moves the current moment; without one, a page's script may call
    `infworldSetFrame(elem_id, frame)`.
    """

    def __init__(
        self,
        value: ActionScript | dict | None = None,
        *,
        num_frames: int | None = None,
        horizon_frames: int | None = None,
        chunk_frames: int = 80,
        fps: int = 30,
        turn_degrees: float = 1.125,
        step_units: float = 0.04,
        frame: int = 0,
        follow: str = "",
        **kwargs: Any,
    ):
        self.num_frames, self.horizon_frames, self.chunk_frames = num_frames, horizon_frames, chunk_frames
        self.fps, self.turn_degrees, self.step_units = fps, turn_degrees, step_units
        self.frame, self.follow = frame, follow
        super().__init__(
            value=value,
            html_template=_HTML,
            css_template=_CSS,
            js_on_load=f"const initial = {json.dumps(self._initial())};\n{_JS}",
            apply_default_css=False,
            **{"label": "Actions", **kwargs},
        )

    def _initial(self) -> dict[str, Any]:
        """What the script in the browser starts with. An update replaces all props, so the constants are not props."""
        settings = ("num_frames", "horizon_frames", "chunk_frames", "fps", "turn_degrees", "step_units", "frame")
        return {
            **{name: getattr(self, name) for name in (*settings, "follow")},
            "moves": [[name, words(Segment(index, 0, 1))] for index, name in enumerate(MOVES)],
            "views": [[name, words(Segment(0, index, 1))] for index, name in enumerate(VIEWS)],
            "move_words": MOVE_WORDS,
            "view_words": VIEW_WORDS,
            "wait_word": WAIT_WORD,
            "keys": KEYS,
            "presets": [
                [name, value_of(script)["segments"]]
                for name, script in walk_templates(self.turn_degrees, self.chunk_frames).items()
            ],
            "max_segments": MAX_SEGMENTS,
            "max_frames": MAX_FRAMES,
        }

    def preprocess(self, payload: Any) -> Any:
        """As the browser sent it; `script_of` checks it."""
        return payload

    def postprocess(self, value: ActionScript | dict | None) -> dict[str, list[list[int]]]:
        """A script or a value -> the value. Raises ValueError for a malformed one."""
        return value_of(value if isinstance(value, ActionScript) else script_of(value))

    def api_info(self) -> dict[str, Any]:
        segment = {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 3}
        return {
            "type": "object",
            "properties": {"segments": {"type": "array", "items": segment}},
            "required": ["segments"],
            "description": "segments of [move, view, frames]; move and view count in the order of the action names",
        }

    def example_payload(self) -> Any:
        return value_of(ActionScript.parse("forward 80, right 40"))

    def example_value(self) -> Any:
        return self.example_payload()
