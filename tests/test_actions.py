"""An action script says the same in each of its forms, and whatever it cannot mean is named."""

import itertools
import json

import pytest

from infworld.actions import MAX_FRAMES, MOVES, NO_OP, UNCERTAIN, VIEWS, ActionScript, Segment, words

WALK = "forward 3, forward+left 2, wait 1, strafe left+up+right 4, back+strafe right+down 2"
EVERY_PAIR = [(move, view) for move in range(len(MOVES)) for view in range(len(VIEWS))]
EVERY_ACTION = [pair for pair in EVERY_PAIR if UNCERTAIN not in pair]


def test_names_stand_in_the_order_of_their_indices():
    assert [ActionScript.from_list([{"move": name, "view": "no-op"}]).pairs()[0] for name in MOVES] == [
        (index, 0) for index in range(10)
    ]
    assert [ActionScript.from_list([{"move": "no-op", "view": name}]).pairs()[0] for name in VIEWS] == [
        (0, index) for index in range(10)
    ]


@pytest.mark.parametrize(
    ("text", "move", "view"),
    [
        ("wait 1", "no-op", "no-op"),
        ("forward 1", "go forward", "no-op"),
        ("left 1", "no-op", "turn left"),
        ("strafe left 1", "go left", "no-op"),
        ("forward+strafe right 1", "go forward and go right", "no-op"),
        ("back+up+left 1", "go back", "turn up and turn left"),
        ("Strafe-Right + FORWARD +  down 1", "go forward and go right", "turn down"),
        ("forward+wait 1", "go forward", "no-op"),
    ],
)
def test_words_mean_these_actions(text, move, view):
    assert ActionScript.parse(text).to_list() == [{"move": move, "view": view}]


def test_every_action_survives_every_form():
    script = ActionScript.from_pairs(EVERY_ACTION)
    assert script.pairs() == EVERY_ACTION
    assert ActionScript.parse(script.text()) == script
    every = ActionScript.from_pairs(EVERY_PAIR)  # the labels, too, but for words: nobody can be uncertain on purpose
    assert ActionScript.from_list(every.to_list()) == every == ActionScript.from_json(every.to_json())
    assert words(Segment(UNCERTAIN, UNCERTAIN, 1)) == "wait"


def test_json_is_a_list_of_names_per_frame():
    script = ActionScript.parse(WALK)
    assert json.loads(script.to_json()) == script.to_list()
    assert len(script.to_list()) == len(script) == 12
    assert script.to_list()[3] == {"move": "go forward", "view": "turn left"}


def test_text_may_be_split_by_lines_and_semicolons():
    assert ActionScript.parse(WALK.replace(", ", "\n")) == ActionScript.parse(WALK.replace(", ", " ;,; "))
    assert ActionScript.parse(" \n,") == ActionScript()


def test_equal_neighbours_become_one_segment():
    assert ActionScript.from_pairs([(1, 0)] * 3 + [NO_OP] + [(1, 0)] * 2).text() == "forward 3, wait 1, forward 2"


def test_anything_a_caller_has_becomes_a_script(tmp_path):
    script = ActionScript.parse(WALK)
    path = tmp_path / "walk.JSON"
    path.write_text(script.to_json())
    for actions in (script, WALK, path, str(path), script.to_list(), iter(script.to_list())):
        assert ActionScript.of(actions).pairs() == script.pairs()
    assert ActionScript.of(None) == ActionScript.of([]) == ActionScript.of("") == ActionScript()


def test_past_its_end_nothing_is_done():
    script = ActionScript.parse("forward 2, left 1")
    done = [(1, 0), (1, 0), (0, 3)]
    assert script.pairs(0, 5) == [*done, NO_OP, NO_OP]
    assert script.pairs(2, 4) == [(0, 3), NO_OP]
    assert script.pairs(7, 9) == [NO_OP, NO_OP]
    assert [pair for start in range(0, 81, 9) for pair in script.pairs(start, start + 9)] == script.pairs(0, 81)


def test_what_is_added_after_a_cut_begins_right_there():
    script = ActionScript.parse("forward 30, left 30")
    assert (script.cut(40) + ActionScript.parse("up 5")).text() == "forward 30, left 10, up 5"
    assert (script.cut(70) + ActionScript.parse("up 5")).text() == "forward 30, left 30, wait 10, up 5"
    assert len(script.cut(0)) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fly 80", "unknown action 'fly' in 'fly 80'; known are: forward, back, strafe left, .*wait"),
        ("forward+turn left 80", "unknown action 'turn left'"),
        ("forward+back 80", "'forward\\+back 80' goes both ways at once"),
        ("strafe left+strafe right 80", "goes both ways at once"),
        ("up+down 80", "goes both ways at once"),
        ("forward", "cannot read 'forward': write what to do and for how many frames, such as 'forward\\+left 60'"),
        ("80 forward", "cannot read"),
        ("forward 80 left 20", "cannot read"),
        ("forward+ 80", "cannot read"),
        ("forward -80", "cannot read"),
        ("forward 1.5", "cannot read"),
        ("forward 12345678", "at most 20000 frames"),
        ("forward 80, left 0", "1 frame or more, not 0"),
    ],
)
def test_text_that_means_nothing_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        ActionScript.parse(text)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"move": "no-op", "view": "no-op"}, "must be a list with one entry per frame, not dict"),
        (80, "must be a list with one entry per frame, not int"),
        ([{"move": "no-op", "view": "no-op"}, "forward"], "action of frame 1 must be .*, not 'forward'"),
        ([{"move": "no-op"}], "action of frame 0 must be"),
        ([{"move": "no-op", "view": "no-op", "frames": 3}], "action of frame 0 must be"),
        ([{"move": "fly", "view": "no-op"}], "unknown move 'fly' in frame 0; known are: no-op, go forward"),
        ([{"move": "no-op", "view": "go left"}], "unknown view 'go left' in frame 0; known are: no-op, turn up"),
        ([{"move": 1, "view": 0}], "unknown move 1 in frame 0"),
        ([{"move": ["no-op"], "view": "no-op"}], "unknown move \\['no-op'\\]"),
    ],
)
def test_lists_that_mean_nothing_are_named(actions, message):
    with pytest.raises(ValueError, match=message):
        ActionScript.of(actions)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"move": "no-op", "view": "no-op"}', "must be a list with one entry per frame, not dict"),
        (b"null", "must be a list with one entry per frame, not NoneType"),
        (b'"forward 80"', "must be a list with one entry per frame, not str"),
        (b"\x89PNG\xff\xfe", "walk.json is not a JSON text file"),
    ],
)
def test_files_that_mean_nothing_are_named(tmp_path, content, message):
    (tmp_path / "walk.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ActionScript.of(tmp_path / "walk.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no action file at .*gone.json"):
        ActionScript.of(str(tmp_path / "gone.json"))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ((10, 0, 1), "move must be 0 to 9, not 10"),
        ((0, -1, 1), "view must be 0 to 9, not -1"),
        ((0, "left", 1), "view must be 0 to 9, not 'left'"),
        ((0, 0, 0), "1 frame or more, not 0"),
        ((0, 0, -3), "1 frame or more, not -3"),
        ((0, 0, 1.5), "1 frame or more, not 1.5"),
        ((0, 0, True), "1 frame or more, not True"),
    ],
)
def test_segments_that_cannot_be_are_named(segment, message):
    with pytest.raises(ValueError, match=message):
        Segment(*segment)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActionScript((Segment(1, 0, 10**12),)),
        lambda: ActionScript([Segment(1, 0, MAX_FRAMES), Segment(0, 0, 1)]),
        lambda: ActionScript(itertools.repeat(Segment(1, 0, 1))),
        lambda: ActionScript.from_pairs(itertools.repeat((1, 0))),
        lambda: ActionScript.from_list(itertools.repeat({"move": "no-op", "view": "no-op"})),
        lambda: ActionScript.parse("forward 999999999"),
        lambda: ActionScript.parse("forward 9, back 9," * 100_000),
        lambda: ActionScript.parse("forward 9, back 9," * 10**6),
        lambda: ActionScript.from_json("[" + '{"move": "no-op", "view": "no-op"},' * 10**6),
        lambda: ActionScript.parse(f"forward {MAX_FRAMES}") + ActionScript.parse("back 1"),
    ],
)
def test_actions_have_one_limit_for_every_form(make):
    with pytest.raises(ValueError, match=r"at most (20000 frames|4000000 characters)"):
        make()


def test_the_longest_script_has_all_its_forms():
    script = ActionScript.parse("forward 1, back 1," * (MAX_FRAMES // 2))
    assert len(script) == MAX_FRAMES == len(script.segments)
    assert ActionScript.from_json(script.to_json()) == script == ActionScript.parse(script.text())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_and_text_from_other_systems_are_read(tmp_path, encoding):
    script = ActionScript.parse("forward 2, strafe left+up 3")
    text = script.to_json().replace("\n", "\r\n").replace("}", "\u00a0}").replace("[", "\u2028[\u2003")
    (tmp_path / "a.json").write_text(text, encoding=encoding)
    assert ActionScript.of(tmp_path / "a.json") == ActionScript.from_json("\ufeff" + text) == script
    assert ActionScript.parse("\ufeffforward\u00a02\u2028strafe\u2009left+up 3\u2029") == script
