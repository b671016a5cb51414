"""The Python side of the action editor: what the browser may send, and what it is given."""

import json
import math
import re

import pytest

gr = pytest.importorskip("gradio")
from gradio.blocks import postprocess_update_dict  # noqa: E402

from infworld.actions import MAX_FRAMES, MOVES, VIEWS, ActionScript, Segment  # noqa: E402
from infworld.app.editor import ActionEditor, script_of, value_of  # noqa: E402
from infworld.app.templates import walk_templates  # noqa: E402


def initial(component: ActionEditor) -> dict:
    """What the component hands to the script in the browser."""
    return json.loads(re.match(r"const initial = (.*);\n", component.js_on_load)[1])


def end_of(script: ActionScript, turn_degrees: float) -> tuple[float, float, float]:
    """Where a walk of unit steps ends: x, y and heading in degrees."""
    x = y = heading = 0.0
    for move, view in script.pairs():
        turn = {"turn left": -turn_degrees, "turn right": turn_degrees}.get(VIEWS[view], 0)
        angle, step = math.radians(heading + turn / 2), MOVES[move] == "go forward"
        x, y, heading = x + step * math.sin(angle), y + step * math.cos(angle), heading + turn
    return x, y, heading


@pytest.mark.parametrize("script", [*walk_templates(1.125).values(), ActionScript(), ActionScript((Segment(9, 9, 3),))])
def test_a_value_and_its_script_are_one(script):
    value = json.loads(json.dumps(value_of(script)))
    assert script_of(value) == script
    assert value_of(script_of(value)) == value


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("forward 80", "segments"),
        ({}, "segments"),
        ({"segments": "forward"}, "segments"),
        ({"segments": [[1, 0]]}, "[1, 0]"),
        ({"segments": [[1, 0, 80.5]]}, "80.5"),
        ({"segments": [[True, 0, 80]]}, "True"),
        ({"segments": [[1, 0, "80"]]}, "80"),
        ({"segments": [{"move": 1}]}, "move"),
        ({"segments": [[10, 0, 80]]}, "10"),
        ({"segments": [[-1, 0, 80]]}, "-1"),
        ({"segments": [[0, 0, 0]]}, "0"),
        ({"segments": [[0, 0, 10**12]]}, "frames"),
        ({"segments": [[0, 0, 1]] * (MAX_FRAMES + 1)}, "frames"),
    ],
)
def test_a_bad_value_from_a_browser_is_named(value, names):
    with pytest.raises(ValueError, match=re.escape(names)):
        script_of(value)


def test_no_value_is_the_empty_script():
    assert script_of(None) == ActionScript()


@pytest.mark.parametrize("turn_degrees", [1.125, 1.5, 0.9])
@pytest.mark.parametrize("name", ["Look around", "Full circle", "Walk and return", "Square"])
def test_closed_templates_end_where_they_began(name, turn_degrees):
    x, y, heading = end_of(walk_templates(turn_degrees)[name], turn_degrees)
    assert math.hypot(x, y) < 1e-6
    assert heading % 360 == pytest.approx(0, abs=1e-6) or heading % 360 == pytest.approx(360)


def test_templates_have_the_published_lengths():
    lengths = {name: len(script) for name, script in walk_templates(1.125).items()}
    assert lengths["Full circle"] == 320
    assert (lengths["Campus walk"], lengths["Fantasy street"]) == (1396, 1558)


def test_a_camera_that_does_not_turn_has_no_templates():
    with pytest.raises(ValueError, match="turn_degrees"):
        walk_templates(0)


def test_the_browser_is_given_the_vocabulary():
    given = initial(ActionEditor())
    assert [name for name, _ in given["moves"]] == list(MOVES)
    assert [name for name, _ in given["views"]] == list(VIEWS)
    words = {**given["move_words"], **given["view_words"]}
    assert set(given["keys"].values()) == set(words)
    for name, segments in given["templates"]:
        assert script_of({"segments": segments}) == walk_templates(1.125)[name]


def test_the_component_takes_scripts_and_values_and_refuses_others():
    script = ActionScript.parse("forward 80, left 40")
    assert ActionEditor(script).value == ActionEditor(value_of(script)).value == value_of(script)
    assert ActionEditor().value == {"segments": []}
    with pytest.raises(ValueError, match="whole numbers"):
        ActionEditor({"segments": [[1]]})


def test_settings_can_be_updated():
    component = ActionEditor(num_frames=161)
    update = postprocess_update_dict(component, {"num_frames": 321, "value": ActionScript.parse("back 4")})
    assert update["props"] == {"num_frames": 321}
    assert update["value"] == {"segments": [[2, 0, 4]]}
    json.dumps(update)


def test_programs_are_told_the_shape_of_the_value():
    with gr.Blocks() as page:
        component = ActionEditor()
        component.change(lambda value: script_of(value).text(), component, gr.Textbox(), api_name="text")
    (parameter,) = page.get_api_info()["named_endpoints"]["/text"]["parameters"]
    assert "segments" in parameter["python_type"]["type"]
    assert script_of(parameter["example_input"]).text() == "forward 80, right 40"


def test_nothing_is_loaded_from_elsewhere_and_templates_stay_templates():
    component = ActionEditor()
    for text in (component.html_template, component.css_template, component.js_on_load):
        assert "http" not in text and re.findall(r"import\((\w+)", text) in ([], ["addresses"])
    for template in (component.html_template, component.css_template):  # Gradio fills these with two languages
        assert not re.search(r"\{\{|`|\$\{|\\", template)
