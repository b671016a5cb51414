"""The action editor of the page: timeline, keys, text and map of one script, as a Gradio component.

What the person sees and does is in `static/` (`editor.js` and the modules that it imports); this file gives them the
vocabulary of `infworld.actions` and the motion of `infworld.camera`, and checks what comes back.
"""

from __future__ import annotations

from typing import Any

from infworld.actions import (
    MAX_FRAMES,
    MOVE_WORDS,
    MOVES,
    VIEW_WORDS,
    VIEWS,
    WAIT_WORD,
    ActionScript,
    Segment,
    words,
)
from infworld.app.modules import ModuleHTML
from infworld.app.templates import walk_templates
from infworld.camera import DEFAULT, motion
from infworld.config import CameraConfig

# KeyboardEvent.code -> word of the text form. Codes name places on the keyboard, so W A S D is a cross on any layout.
KEYS = {
    **{"KeyW": "forward", "KeyS": "back", "KeyA": "strafe left", "KeyD": "strafe right"},
    **{"ArrowUp": "up", "ArrowDown": "down", "ArrowLeft": "left", "ArrowRight": "right"},
}


# What the browser has to know of the actions' names, words and keys.
VOCABULARY = {
    "moves": [[name, words(Segment(index, 0, 1))] for index, name in enumerate(MOVES)],
    "views": [[name, words(Segment(0, index, 1))] for index, name in enumerate(VIEWS)],
    "move_words": MOVE_WORDS,
    "view_words": VIEW_WORDS,
    "wait_word": WAIT_WORD,
    "max_frames": MAX_FRAMES,
    "keys": KEYS,
}


def value_of(script: ActionScript) -> dict[str, list[list[int]]]:
    """The editor's value that shows `script`."""
    return {"segments": [[s.move, s.view, s.frames] for s in script.segments]}


def script_of(value: Any) -> ActionScript:
    """The script in an editor's value. The value comes from a browser: ValueError for anything malformed or too long.

    None is the empty script.
    """
    if value is None:
        return ActionScript()
    if not isinstance(value, dict) or not isinstance(value.get("segments"), list):
        raise ValueError('the actions must be {"segments": [[move, view, frames], ...]}')
    return ActionScript(_segment(segment) for segment in value["segments"])


def _segment(numbers: Any) -> Segment:
    if not isinstance(numbers, list) or len(numbers) != 3 or not all(type(n) is int for n in numbers):
        raise ValueError(f"a segment must be [move, view, frames] in whole numbers, not {str(numbers)[:80]}")
    return Segment(*numbers)


class ActionEditor(ModuleHTML):
    """Edits an action script as a timeline, by recorded keys and as text, and draws its path on a map.

    Value: `{"segments": [[move, view, frames], ...]}` (`value_of`, `script_of`). Events: `input` when the person
    edits, `change` when anything does; a recording shows its value at each chunk border and at its end.

    `num_frames`, `horizon_frames`, `chunk_frames`, `fps` and `frame` may be updated with `gr.update`. num_frames:
    frames of the film (None: not known); horizon_frames: longest film the model was trained for (None: unlimited);
    chunk_frames: frames per chunk; fps: frames per second; frame: the current moment of the film. camera: what an
    action does on the map. `follow` is a CSS selector of a video element whose playing moves the current moment;
    without one, a page's script may call `infworldSetFrame(elem_id, frame)`.
    """

    TRIGGERS = ("input",)

    def __init__(
        self,
        value: ActionScript | dict | None = None,
        *,
        num_frames: int | None = None,
        horizon_frames: int | None = None,
        chunk_frames: int = 80,
        fps: int = 30,
        camera: CameraConfig = DEFAULT,
        frame: int = 0,
        follow: str = "",
        **kwargs: Any,
    ):
        self.num_frames, self.horizon_frames, self.chunk_frames = num_frames, horizon_frames, chunk_frames
        self.fps, self.camera, self.frame, self.follow = fps, camera, frame, follow
        super().__init__("editor", self._initial(), value=value, **{"label": "Actions", **kwargs})

    def _initial(self) -> dict[str, Any]:
        """What the script in the browser starts with. An update replaces all props, so the constants are not props."""
        settings = ("num_frames", "horizon_frames", "chunk_frames", "fps", "frame", "follow")
        templates = walk_templates(self.camera.turn_degrees, self.chunk_frames)
        return {
            **{name: getattr(self, name) for name in settings},
            **VOCABULARY,
            "motion": motion(self.camera),
            "templates": [[name, value_of(script)["segments"]] for name, script in templates.items()],
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
