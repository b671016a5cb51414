"""The camera by dead reckoning, in Python and, by the same numbers, in the browser's own language."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from infworld.actions import ActionScript, Segment
from infworld.app.editor import VOCABULARY, value_of
from infworld.camera import DEFAULT, motion, revisits, seen_before, walk
from infworld.config import CameraConfig, ModelConfig, from_dict

STATIC = Path(__file__).parent / "static"
CAMERAS = [DEFAULT, CameraConfig(turn_degrees=0.9, pitch_degrees=1.1, pitch_limit=30.0, step=0.07, fov_degrees=65.0)]


def node(*arguments: str, given: object) -> str:
    """Runs Node with JSON on stdin; returns what it printed."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("no Node on PATH")
    done = subprocess.run([program, *arguments], input=json.dumps(given), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


OPPOSITE = (0, 2, 1, 4, 3, 8, 7, 6, 5, 9)  # of moves as of views


def random_script(seed: int) -> ActionScript:
    """A walk of any moves and views, on the spot and under way, and then the way back."""
    draw = random.Random(seed)
    there = [Segment(draw.randrange(10), draw.randrange(10), draw.choice([1, 7, 20, 40, 80])) for _ in range(8)]
    return ActionScript(there + [Segment(OPPOSITE[s.move], OPPOSITE[s.view], s.frames) for s in reversed(there)])


@pytest.mark.parametrize("name", ["script.test.mjs", "frames.test.mjs"])
def test_the_modules_of_the_page_hold_by_themselves(name):
    node(str(STATIC / name), given=VOCABULARY)


@pytest.mark.parametrize("camera", CAMERAS, ids=["trained", "other"])
def test_the_browser_walks_and_sees_again_as_python_does(camera):
    texts = ["forward 80, right 160, forward 80", "right 320", "wait 300", "up 80, down 160, up 80"]
    texts += ["right 20, left 20", "forward+strafe left 60, back+strafe right 60", "forward 160, back 160, forward 160"]
    scripts = [ActionScript(), *map(ActionScript.parse, texts), *map(random_script, range(40))]
    given = {"values": [value_of(script) for script in scripts], "motion": motion(camera)}
    results = json.loads(node(str(STATIC / "path.mjs"), given=given))
    for script, result in zip(scripts, results, strict=True):
        poses = walk(script, 1 + len(script), camera)
        assert np.allclose(result["poses"], poses, atol=1e-9)
        for name, view in (("places", False), ("views", True)):
            again = [i for i in range(len(poses)) if len(seen_before(poses, i, camera, view=view))]
            assert result[name] == again, (script.text(), name)
    assert sum(len(result["views"]) for result in results) > 1000  # the walks do come back


def test_seen_before_is_what_its_words_say():
    """Against a plain reading of the definition, frame by frame."""
    for seed in range(3):
        script = random_script(seed)
        poses = walk(script, 1 + len(script))
        for again in range(0, len(poses), 37):
            apart = [np.hypot(*(poses[i] - poses[again])[:2]) / DEFAULT.step for i in range(again)]
            turned = [max(abs((p[2] - poses[again][2] + 180) % 360 - 180), abs(p[3] - poses[again][3])) for p in poses]
            same = [i for i in range(again) if apart[i] < 4.5 and turned[i] < 6]
            left = [j for j in range(again) if apart[j] > 20.5 or turned[j] > 40]
            expected = [i for i in same if any(i < j for j in left)]
            assert seen_before(poses, again).tolist() == expected


def test_revisits_choose_the_closest_earlier_view():
    poses = walk(ActionScript.parse("right 80, left 80"), 161)
    found = revisits(poses)
    assert len(found) == 6 and found[-1] == (0, 80, 160)
    assert all(first + again == 160 and away == 80 for first, away, again in found)


def test_the_camera_is_the_models():
    config = from_dict(ModelConfig, {"camera": {"turn_degrees": 2.25, "step": 1}}, "test")
    assert config.camera == CameraConfig(turn_degrees=2.25, step=1.0)
    x, z, yaw, _ = walk(ActionScript.parse("right 40, forward 3"), 44, config.camera)[-1]
    assert (x, z, yaw) == (pytest.approx(3), pytest.approx(0), 90)
    for wrong in ({"step": 0}, {"turn_degrees": float("nan")}, {"fov_degrees": 180}, {"pitch_limit": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            from_dict(ModelConfig, {"camera": wrong}, "test")


def test_training_moves_the_camera_alike():
    torch = pytest.importorskip("torch")
    from infworld.training.worlds import MOVE_DIRECTIONS, PITCH, STEP, TURN, VIEW_DIRECTIONS

    table = motion()
    aside, ahead = torch.tensor(table["moves"]).T
    assert torch.allclose(torch.stack([ahead, -aside], 1), torch.tensor(MOVE_DIRECTIONS) * STEP)
    turn, rise = torch.tensor(table["views"]).deg2rad().T
    assert torch.allclose(torch.stack([-turn, rise], 1), torch.tensor(VIEW_DIRECTIONS) * torch.tensor([TURN, PITCH]))
