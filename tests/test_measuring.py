"""`infworld evaluate`: cases of three layouts, films with whole and cut memory, a report that can be gone on with."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL_MODEL

import infworld
from infworld.actions import MOVES, ActionScript
from infworld.cli import evaluate
from infworld.evaluation import run as running
from infworld.evaluation.cases import SHIPPED, Case, read_suite
from infworld.evaluation.measure import Film, figures, gaps
from infworld.evaluation.report import text_table
from infworld.evaluation.takes import LAST, QUICK, WHOLE, Scope, Take, film, forget, plan
from infworld.metrics.memory import mirror
from infworld.metrics.quality import motion_smoothness
from infworld.metrics.stability import seams
from infworld.video import read_mp4
from infworld.world import World

CHUNK = 8  # frames, so that a test takes seconds


@pytest.fixture(scope="module")
def short(small_model, tmp_path_factory) -> Path:
    """The config of the small model with chunks of 8 frames."""
    path = small_model.with_name("short.yaml")
    data = {**SMALL_MODEL, "name": "short", "validation_data": {"num_frames": CHUNK + 1}, "buckets": [[32, 48]]}
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def short_world(short) -> World:
    return infworld.load(short, device="cpu")


@pytest.fixture
def cases(tmp_path, picture) -> Path:
    folder = tmp_path / "cases"
    folder.mkdir()
    entries = [
        {"name": "turn", "picture": str(picture), "actions": "right 16, left 16", "prompt": "a hall"},
        {"name": "walk", "picture": str(picture), "actions": "forward 8, wait 8, back 8"},
    ]
    (folder / "cases.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


# --- cases


def test_the_shipped_cases_are_12_walks_of_16_chunks_that_return():
    suite = read_suite(SHIPPED, 30)
    assert len(suite.cases) == 12
    assert all(len(case.actions) == 1280 and case.prompt for case in suite.cases)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 300_000


def test_cases_beside_their_pictures_as_in_examples():
    suite = read_suite(Path(infworld.__file__).parent.parent / "examples", 30)
    assert suite.cases[0].name == "1-island-look-and-return"
    assert suite.cases[0].actions.text() == "right 80, left 80"
    assert "island" in suite.cases[0].prompt
    assert suite.film("a") == "a.mp4"


def test_wbench_cases_run_as_they_are(tmp_path, picture):
    (tmp_path / "cases").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "case_2.png").write_bytes(picture.read_bytes())
    turns = ["W", "W+→", "the lamp falls over", "←"]
    case = {
        "id": "2",
        "description": "a street at night",
        "settings": {"initial_image": "data/elsewhere/images/case_2.png", "perspective": "first_person"},
        "interactions": [{"action": action} for action in turns],
    }
    (tmp_path / "cases" / "case_2.json").write_text(json.dumps(case), encoding="utf-8")
    event = {**case, "id": "e_1", "interactions": [{"action": "it rains"}]}
    (tmp_path / "cases" / "case_e_1.json").write_text(json.dumps(event), encoding="utf-8")
    suite = read_suite(tmp_path, 30)
    assert [found.name for found in suite.cases] == ["2"]  # the other has no navigation
    assert suite.cases[0].actions.text() == "forward 120, forward+right 120, wait 120, left 120"
    assert suite.cases[0].turns == (0, 120, 240, 360, 480)
    assert suite.cases[0].prompt == "a street at night"
    assert suite.film("2") == "videos/case_2_combined.mp4"


@pytest.mark.parametrize(
    "entries, message",
    [
        ([], "no cases"),
        ([{"name": "a"}], "name, picture, actions and prompt"),
        ([{"name": "../a", "picture": "x.png", "actions": "right 8"}], "cannot be a file name"),
        ([{"name": "a", "picture": "gone.png", "actions": "right 8"}], "case a: no picture"),
        ([{"name": "a", "picture": "x.png", "actions": "fly 8"}], "case a: unknown action 'fly'"),
        ([{"name": "a", "picture": "x.png", "actions": ""}], "case a has no actions"),
        ([{"name": "a", "picture": "x.png", "actions": "right 8"}] * 2, "two cases with the name a"),
        ({}, "must hold a list"),
    ],
)
def test_wrong_cases_are_named(tmp_path, picture, entries, message):
    (tmp_path / "x.png").write_bytes(picture.read_bytes())
    (tmp_path / "cases.json").write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_suite(tmp_path, 30)


# --- films


def test_the_plan_has_every_film_once_and_pairs_share_their_seed():
    takes = plan(read_suite(SHIPPED, 30).cases, Scope(), 80, 5)
    assert len({take.name for take in takes}) == len(takes)
    pairs = [take for take in takes if take.kind in ("walk", "mirror")]
    assert len(pairs) == 12 * 4
    assert {take.seed for take in pairs if take.case.name == "circles"} == {6}
    assert all(len(take.actions) == 160 for take in pairs if take.kind == "mirror")
    mirror = next(
        take for take in pairs if take.name == "mirror-waiting-whole"
    )  # begins with waiting, which is no test
    assert mirror.actions.text() == "right 80, left 80"


def test_a_case_that_does_nothing_has_no_mirror_test(picture):
    case = Case("idle", picture, ActionScript.parse("wait 80"))
    assert "mirror" not in {take.kind for take in plan((case,), Scope(), 80, 0)}


def test_a_quick_evaluation_is_a_few_chunks_and_still_returns():
    takes = plan(read_suite(SHIPPED, 30).cases, QUICK, 80, 0)
    assert sum(take.chunks for take in takes) <= 36


def test_films_with_whole_memory_are_the_worlds_own(short_world, picture):
    case = Case("a", picture, ActionScript.parse("right 16"), "words")
    take = Take("walk", case, case.actions, 2, seed=3)
    rollout = short_world.rollout(picture, "right 16", "words", 1 + 2 * CHUNK, seed=3)
    expected = np.concatenate([chunk.frames for chunk in rollout])
    np.testing.assert_array_equal(film(short_world, take, {}), expected)


def test_memory_cut_to_the_last_frame_sees_only_it(short_world, picture, monkeypatch):
    """The compressor gets one latent for every chunk; noise and actions are those of the whole film."""
    seen, asked = [], []
    encoder, actions = short_world.transformer.latent_encoder.conv_in, short_world.transformer.action_encoder
    encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2]))
    actions.register_forward_pre_hook(lambda module, args: asked.append(args[1][0].tolist()))
    case = Case("a", picture, ActionScript.parse("right 8, left 8, right 8"))
    whole = film(short_world, Take("walk", case, case.actions, 3, 0), {})
    views = list(asked)
    cut = film(short_world, Take("walk", case, case.actions, 3, 0, LAST), {})
    assert seen == [1, 3, 5, 1, 1, 1]
    assert asked[3:] == views
    assert whole.shape == cut.shape
    np.testing.assert_array_equal(whole[: 1 + CHUNK], cut[: 1 + CHUNK])  # the first chunk knows one frame either way
    encoder._forward_pre_hooks.clear()
    actions._forward_pre_hooks.clear()


def test_forgetting_keeps_noise_and_what_is_to_come(short_world, picture):
    session = short_world.next_chunk(short_world.start(picture, "right 8, left 4, forward 4")).session
    last = np.zeros((32, 48, 3), np.uint8)
    forgotten = forget(short_world, session, last)
    assert forgotten.settings.actions.text() == "left 4, forward 4"
    assert torch.equal(forgotten.generator_state, session.generator_state)
    assert forgotten.history.shape[2] == 1 and not forgotten.picture.any()
    assert session.num_frames == 1 + CHUNK  # untouched


# --- the command


def evaluated(arguments: list[str]) -> int:
    return evaluate.main([*arguments, "--device", "cpu"])


@pytest.fixture(scope="module")
def report(short, tmp_path_factory, picture) -> Path:
    """A quick evaluation of two cases, with films."""
    folder = tmp_path_factory.mktemp("evaluation")
    entries = [
        {"name": "turn", "picture": str(picture), "actions": "right 40, left 40", "prompt": "a <hall> & more"},
        {"name": "walk", "picture": str(picture), "actions": "forward 8, wait 8, back 8"},
    ]
    (folder / "cases").mkdir()
    (folder / "cases" / "cases.json").write_text(json.dumps(entries), encoding="utf-8")
    arguments = ["--model", str(short), "--cases", str(folder / "cases"), "--out", str(folder / "report"), "--quick"]
    arguments += ["--films", str(folder / "films"), "--frames", "81"]
    assert evaluated(arguments) == 0
    return folder


def test_the_report_is_one_file_with_figures_plots_and_strips(report):
    html = (report / "report" / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 4
    assert html.count("data:image/webp;base64,") == 5  # two walks with either memory, and the still film
    assert not re.search(r"(src|href)=\"(?!data:|#)", html)  # nothing is fetched
    assert "returns of the walks" in html and "last frame only" in html
    data = json.loads((report / "report" / "report.json").read_text(encoding="utf-8"))
    assert data["settings"]["model"] == "short" and data["settings"]["steps"] == 2
    assert len(data["films"]) == 4 + 4 + 8 + 1
    rows = {(row["kind"], row["measure"]): row for row in data["figures"]}
    assert rows["walk", "return best"]["whole"]["low"] <= rows["walk", "return best"]["whole"]["mean"]
    assert rows["mirror", "mirror best"].keys() >= {"whole", "last"}
    table = list(csv.DictReader((report / "report" / "films.csv").open(encoding="utf-8")))
    assert {row["film"] for row in table} == {entry["name"] for entry in data["films"]}
    assert float(next(row["value"] for row in table if row["measure"] == "motion smoothness")) > 50


def test_the_films_lie_under_their_cases_names_with_an_index(report):
    assert read_mp4(report / "films" / "turn.mp4").shape[0] == 81
    assert (report / "films-last-frame" / "walk.mp4").is_file()
    index = {entry["case"]: entry for entry in json.loads((report / "films" / "films.json").read_text())}
    assert index["turn"]["actions"] == "right 40, left 40"
    first, again = index["turn"]["revisit"]
    assert first < 40 < again and abs(first + again - 80) <= 4


def test_an_interrupted_evaluation_goes_on_where_it_was(report, short, monkeypatch, capsys):
    lost = report / "report" / "measured" / "mirror-turn-last.json"
    before, rest = lost.read_text(), {p: p.stat().st_mtime_ns for p in lost.parent.glob("*.json") if p != lost}
    lost.unlink()
    made = []
    monkeypatch.setattr(running, "film", lambda world, take, *rest: made.append(take.name) or film(world, take, *rest))
    arguments = ["--model", str(short), "--cases", str(report / "cases"), "--out", str(report / "report"), "--quick"]
    assert evaluated([*arguments, "--frames", "81"]) == 0
    assert made == ["mirror-turn-last"]
    done, total = map(int, re.search(r"(\d+)/(\d+) \[00:00<\?", capsys.readouterr().err).groups())
    assert total - done == 2  # chunks that the time left is for
    assert all(path.stat().st_mtime_ns == then for path, then in rest.items())
    assert json.loads(lost.read_text())["measures"] == json.loads(before)["measures"]  # seeds are fixed
    assert evaluated([*arguments, "--frames", "81", "--seed", "9"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_wbench_films_have_their_turns(short_world, picture, tmp_path):
    case = Case("7", picture, ActionScript.parse("right 12, left 12"), turns=(0, 12, 24))
    suite = dataclasses.replace(read_suite(SHIPPED, 30), cases=(case,), film_name="videos/case_{}_combined.mp4")
    folder = running.FilmFolder(tmp_path / "wbench", suite)
    take = Take("walk", case, case.actions, 3, 0)
    evaluation = running.Evaluation(tmp_path / "report", {})
    list(running.run(evaluation, short_world, [take], {}, folder))
    assert (tmp_path / "wbench" / "videos" / "case_7_combined.mp4").is_file()
    turns = json.loads((tmp_path / "wbench" / "turns.json").read_text())
    assert turns["fps"] == 30 and turns["cases"] == {"7": {"turn_frames": [0, 12, 24]}}


def test_what_cannot_work_is_said_in_one_line(tmp_path, short, capsys):
    assert evaluated(["--model", str(short), "--cases", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "no folder of cases" in capsys.readouterr().err
    assert evaluated(["--model", str(short), "--frames", "80", "--out", str(tmp_path)]) == 2


# --- figures


def films_of(memory: str, best: float, sharpness: float) -> list[Film]:
    measures = {"return best": best, "return score": best, "return after 2 score": best, "last sharpness": sharpness}
    return [
        Film(f"walk-{case}-{memory}", "walk", case, memory, 81, 1.0, measures | {"sharpness by chunk": [1, 1]})
        for case in "abc"
    ]


def test_a_forgetful_model_is_worse_at_memory_and_not_at_the_rest():
    films = films_of(WHOLE, 24.0, 0.9) + films_of(LAST, 13.0, 0.9)
    rows = {row.measure: columns for row, columns in figures(films) if row.kind == "walk"}
    assert rows["return best"][WHOLE].low > rows["return best"][LAST].high
    assert rows["last sharpness"][WHOLE].mean == rows["last sharpness"][LAST].mean
    assert gaps(films)[2][LAST].mean == 13
    assert "| returns, best PSNR within 4 frames | 24.0 [24.0, 24.0] dB | 13.0 [13.0, 13.0] dB |" in text_table(films)


def test_every_move_and_view_has_a_word():
    names = {take.name for take in plan(read_suite(SHIPPED, 30).cases, Scope(), 80, 0) if take.kind == "action"}
    assert len(names) == 2 * (8 + 8 + 6) and "action-looking-about-forward-strafe-left-whole" in names
    assert len(MOVES) == 10


def test_the_tiny_model_without_its_memory_is_worse_at_memory_and_not_at_the_rest():
    """A quarter turn and back, with the whole memory and with the last frame alone."""
    tiny = infworld.load("tiny", device="cpu")
    case = next(case for case in read_suite(SHIPPED, 30).cases if case.name == "looking-about")
    (whole, cut) = (
        film(tiny, take, {}) for take in plan((case,), Scope(), 80, 0) if take.name.startswith("mirror-looking-about")
    )
    remembered, forgotten = (np.mean([found.best for found in mirror(frames, 80)]) for frames in (whole, cut))
    assert remembered > forgotten + 5
    assert abs(motion_smoothness(whole) - motion_smoothness(cut)) < 0.01
    assert max(seams(cut, 80)) < 2 * max(*seams(whole, 80), 2)
