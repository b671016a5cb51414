"""The evaluation: its films are the engine's, its measures know the truth, its numbers do not depend on chance."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from PIL import Image

from infworld import live
from infworld.actions import ActionScript
from infworld.config import RolloutConfig
from infworld.measures import MAX_PSNR, psnr
from infworld.text import load_text_encoder
from infworld.training import evaluate, films, measures, report
from infworld.training.films import Film, make_bench, next_chunk, own_film, same_script
from infworld.training.frames import to_frames, to_video
from infworld.training.measures import Figure, summarize
from infworld.training.pictures import make_atlas
from infworld.training.render import render
from infworld.training.worlds import EVAL_SEEDS, TURN, captions, spawn, walk
from infworld.world import World

CHUNK = 8  # frames, so that a test takes seconds
HEIGHT, WIDTH = 16, 32
SEEDS = list(EVAL_SEEDS[:3])
RATIOS = ("contrast", "saturation", "sharpness")


@pytest.fixture(scope="module")
def text_encoder(world):
    return load_text_encoder(world.config, "cpu", torch.float32)


@pytest.fixture(scope="module")
def model(world, text_encoder) -> World:
    """The small model with chunks of 8 frames and pictures of 16 x 32 pixels, sampled with all that tiny has."""
    rollout = RolloutConfig(num_frames=CHUNK + 1)
    sampler = dataclasses.replace(world.config.val_scheduler_cfg, settled=0.05, memory_guidance=1.0)
    sizes = {"validation_data": rollout, "buckets": ((HEIGHT, WIDTH),)}
    config = dataclasses.replace(world.config, val_scheduler_cfg=sampler, **sizes)
    return World(config, world.transformer, world.vae, text_encoder)


@pytest.fixture(scope="module")
def bench(model, text_encoder) -> films.Bench:
    return make_bench(model, text_encoder, SEEDS)


@pytest.fixture(scope="module")
def film(bench) -> Film:
    """A true visit of one chunk."""
    return films.true_film(bench, films.true_walk(bench, same_script(bench, f"right {CHUNK}")))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.inference_mode():
        yield


def test_the_films_are_the_engines(bench, model):
    """Picture by picture what World films, given the same noise and words."""
    script = same_script(bench, f"right {CHUNK}, forward {CHUNK}")
    start = films.true_film(bench, bench.render(spawn(bench.worlds)[:, None]))
    made = own_film(bench, start, script, 2)
    caption = captions(bench.worlds)[1]
    session = model.start(start.frames[1, 0].numpy(), f"right {CHUNK}, forward {CHUNK}", caption)
    frames = []
    for so_far in (start, own_film(bench, start, script, 1)):
        chunk = model.next_chunk(session, noise=films.draw_noise(bench, so_far)[1:2])
        session = chunk.session
        frames.append(torch.from_numpy(chunk.frames))
    assert torch.allclose(session.history, made.history[1:2], atol=1e-4)
    assert (torch.cat(frames).int() - made.frames[1].int()).abs().max() <= 1


def test_another_worlds_memory_changes_the_chunk(bench, film):
    script = same_script(bench, f"right {CHUNK}, left {CHUNK}")
    right, wrong = (next_chunk(bench, film, script, wrong_memory=wrong) for wrong in (False, True))
    assert (right - wrong).abs().max() > 1e-4


def test_ones_own_memory_is_no_wrong_memory(bench, film):
    """If all worlds have seen the same, swapping memories changes nothing: the last latent stays where it is."""
    same = dataclasses.replace(film, history=film.history[:1].repeat(3, 1, 1, 1, 1))
    script = same_script(bench, f"right {CHUNK}, left {CHUNK}")
    right, wrong = (next_chunk(bench, same, script, wrong_memory=wrong) for wrong in (False, True))
    assert torch.equal(right, wrong)


def test_the_beginning_of_a_chunk_is_decoded_alone(bench, film):
    script = same_script(bench, f"right {CHUNK}")
    whole, beginning = next_chunk(bench, film, script), next_chunk(bench, film, script, frames=4)
    assert beginning.shape[2] == 5
    assert torch.allclose(beginning, whole[:, :, :5], atol=1e-5)


def test_noise_depends_on_world_chunk_and_seed_only(bench, film, model, text_encoder):
    noise = films.draw_noise(bench, film)
    other = make_bench(model, text_encoder, SEEDS[1:])
    part = Film(film.frames[1:], film.history[1:], {})
    assert torch.equal(films.draw_noise(other, part), noise[1:])
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(films.draw_noise(dataclasses.replace(bench, seed=1), film), noise)
    longer = dataclasses.replace(film, frames=film.frames.repeat(1, 2, 1, 1, 1))
    assert not torch.equal(films.draw_noise(bench, longer), noise)


def test_a_live_film_is_a_live_walk(bench, model, monkeypatch):
    """A world of a batch gets what `LiveWalk` makes of it, across a refreshment of its memory."""
    monkeypatch.setattr(live, "UNTRAINED_REFRESH", 2)
    script = same_script(bench, "right 8, forward 12")
    start = films.true_film(bench, bench.render(spawn(bench.worlds)[:, None]))
    made = films.live_film(bench, start, script, 5, films.LiveMemory())
    walk = live.LiveWalk(model, model.start(start.frames[1, 0].numpy(), None, captions(bench.worlds)[1]))
    iterate = model.iterate
    for chunk in range(5):
        known = 1 + 4 * chunk
        so_far = Film(made.frames[:, :known], made.history, {})
        noise = films.draw_noise(bench, so_far, 4)[1:2]
        monkeypatch.setattr(model, "iterate", partial(iterate, noise=noise))
        actions = ActionScript.from_pairs(script[1, :, known - 1 : known + 3].T.tolist())
        for _ in walk.iterate_chunk(actions, 4):
            pass
    assert torch.allclose(walk.session.history, made.history[1:2], atol=1e-4)


def test_a_wrong_live_memory_is_another_worlds(bench, film):
    right, wrong = (films.LiveMemory(wrong).update(bench, film).tokens[0] for wrong in (False, True))
    assert (right - wrong).abs().max() > 1e-4
    assert torch.equal(right[:, -2:], wrong[:, -2:])  # the last latent's tokens


def test_frames_survive_the_way_to_video_and_back():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(2, 3, -1, -1, 3)
    assert torch.equal(to_frames(to_video(frames)), frames)


def test_psnr_of_known_errors():
    frames = torch.full((2, 3, 8, 8, 3), 100, dtype=torch.uint8)
    assert torch.equal(psnr(frames, frames), torch.full((2, 3), MAX_PSNR))
    assert psnr(frames + 10, frames) == pytest.approx(28.13, abs=0.01)


def test_blur_lowers_sharpness_and_grey_lowers_saturation():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (2, 3, 16, 16, 3), generator=generator, dtype=torch.uint8)
    pale = (frames.float() * 0.5 + 64).to(torch.uint8)
    assert torch.allclose(measures.sharpness(pale), measures.sharpness(frames) / 2, rtol=0.02)
    assert torch.allclose(measures.contrast(pale), measures.contrast(frames) / 2, rtol=0.02)
    assert (measures.saturation(pale) < measures.saturation(frames)).all()
    assert (measures.saturation(frames[..., :1].expand(-1, -1, -1, -1, 3)) == 0).all()


def test_the_truth_recalls_itself(bench, film, monkeypatch):
    """A model that shows the truth with the right memory and the neighbour's truth with the wrong one."""
    script = same_script(bench, f"right {CHUNK}, left {CHUNK}")
    truth = films.true_walk(bench, script)[:, CHUNK:]

    def perfect(bench, film, script, wrong_memory=False):
        return to_video(truth.roll(1, dims=0) if wrong_memory else truth)

    monkeypatch.setattr(evaluate, "next_chunk", perfect)
    found = evaluate._recall(bench, film, script, truth).measures
    assert (found["value"] == MAX_PSNR).all()
    assert (found["wrong"] < 30).all()
    assert torch.allclose(found["gain"], found["value"] - found["wrong"])
    assert summarize(found["sharpness"]).mean == pytest.approx(1)


@pytest.mark.parametrize("kind", ["view", "move"])
def test_true_frames_obey_every_action_and_still_ones_only_the_first(bench, monkeypatch, kind):
    """The true renders, late by one frame in eight, are all judged right; a still picture is right for no-op alone."""
    longer = dataclasses.replace(bench.model.config, validation_data=RolloutConfig(num_frames=81))
    bench = dataclasses.replace(bench, model=World(longer, bench.model.transformer, bench.model.vae, None))

    def obedient(bench, film, script, frames):
        poses = walk(bench.worlds, starts(bench), *script.unbind(1))
        index = (torch.arange(frames + 1) * 7) // 8
        return to_video(render(bench.worlds, poses[:, index], *film.frames.shape[2:4]))

    def starts(bench):
        scripts = torch.zeros(9, 2, 24, dtype=torch.int64)
        scripts[:, ("move", "view").index(kind)] = torch.arange(9)[:, None]
        return films.free_starts(bench, scripts.expand(len(SEEDS), -1, -1, -1))

    monkeypatch.setattr(evaluate, "next_chunk", obedient)
    figures, _ = evaluate.run_test(kind, [bench])
    assert figures["value"].mean == 100 and figures["value"].worlds >= 2

    still = lambda bench, film, script, frames: to_video(film.frames.expand(-1, frames + 1, -1, -1, -1))  # noqa: E731
    monkeypatch.setattr(evaluate, "next_chunk", still)
    figures, _ = evaluate.run_test(kind, [bench])
    assert figures["no-op"].mean == 100
    assert figures["value"].mean == pytest.approx(100 / 9)


def test_scripts_that_come_back(bench):
    """What the recall tests rely on: the last chunk ends where the first began, and far never looks there between."""
    starts = spawn(bench.worlds)
    for text in (evaluate.far_script(80), "right 320", "right 80, left 80"):
        script = same_script(bench, text)
        poses = walk(bench.worlds, starts, *script.unbind(1))
        away = (poses[:, -1, 2] - starts[:, 2]).remainder(2 * torch.pi)
        assert torch.minimum(away, 2 * torch.pi - away).max() < 1e-3
        assert (poses[:, 80:-80, 2] - starts[:, None, 2] <= -80 * TURN + 1e-3).all()
    assert script.shape == (3, 2, 160)
    assert same_script(bench, evaluate.far_script(80)).shape[2] == 80 * 10


def test_free_starts_have_room(bench):
    script = same_script(bench, "forward 40")
    poses = walk(bench.worlds, films.free_starts(bench, script[:, None]), *script.unbind(1))
    first = walk(bench.worlds, spawn(bench.worlds), *script.unbind(1))
    gone, gone_first = ((p[:, -1, :2] - p[:, 0, :2]).norm(dim=-1) for p in (poses, first))
    assert (gone >= gone_first - 1e-5).all()


def test_the_interval_holds_the_mean_and_leaves_out_worlds_that_do_not_count():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    figure = summarize(values)
    assert figure.low < figure.mean < figure.high and figure.worlds == 50
    assert figure.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert figure.high - figure.low == pytest.approx(4 * values.std().item() / 50**0.5, rel=0.2)
    assert summarize(torch.cat([values, torch.tensor([torch.nan])])) == figure
    assert summarize(torch.tensor([torch.nan])).worlds == 0
    assert summarize(torch.tensor([[1.0, 2.0], [3.0, 2.0]])).mean == 1  # a ratio of means, not a mean of ratios


def test_the_table_says_what_is_reached():
    def figures(value, gain):
        return {"value": Figure(value, value - 1, value + 1, 64), "gain": Figure(gain, gain - 1, gain + 1, 64)}

    for value, gain, word in ((27, 13, "aim"), (23, 10, "yes"), (27, 9.9, "no"), (22.9, 13, "no")):
        line = report.table({"turn": figures(value, gain)}).splitlines()[2]
        assert line.endswith(f"| 23; +10 | 26; +12 | {word} |")
    drift = {f"{name} {chunk + 1}": Figure(1.15, 1, 2, 16) for name in RATIOS for chunk in range(report.DRIFT_CHUNKS)}
    lines = report.table({"drift": drift}).splitlines()
    assert [line.split(" | ")[-1] for line in lines[2:5]] == ["yes |", "yes |", "no |"]  # no better than 1 / 1.15


def arguments(folder, *more):
    return evaluate.parse_args(["--out", str(folder), "--worlds", "2", *more])


def test_every_test_runs_and_repeats(tmp_path, model, text_encoder):
    """The whole command: a sheet for every test that has pictures, and the same figures the next time."""
    found = []
    for run, tests in (("a", "all"), ("b", "turn,mirror_turn,view,start")):
        assert evaluate.evaluate(arguments(tmp_path / run, "--tests", tests), model, text_encoder)
        found.append(json.loads((tmp_path / run / "evaluation.json").read_text())["tests"])
    assert all(found[0][name] == found[1][name] for name in found[1])
    assert set(found[0]) == set(evaluate.TESTS)
    assert len(found[0]["drift"]) == 3 * report.DRIFT_CHUNKS
    sheets = {path.stem: Image.open(path).size for path in (tmp_path / "a").glob("*.png")}
    assert set(sheets) == set(evaluate.TESTS) - {"view", "move"}
    assert sheets["turn"] == (9 * WIDTH, 2 * 3 * (HEIGHT + report.LABEL_HEIGHT))  # 2 worlds in rows of threes
    assert sheets["rollouts"] == (17 * WIDTH, 2 * (HEIGHT + report.LABEL_HEIGHT))
    lines = (tmp_path / "a" / "evaluation.md").read_text().splitlines()
    rows = [row for row in report.ROWS if row.test in evaluate.TESTS]
    assert sum(row.what in line for row in rows for line in lines) >= len(rows)


def test_batches_change_no_figure_but_the_wrong_memory(model, text_encoder):
    whole, halves = (evaluate.make_benches(model, text_encoder, 5, batch, 0, None) for batch in (5, 2))
    assert [len(bench.worlds) for bench in halves] == [3, 2]  # none alone
    figures = [evaluate.run_test("turn", benches)[0] for benches in (whole, halves)]
    for name in ("value", "still", "whole chunk"):
        assert figures[0][name].mean == pytest.approx(figures[1][name].mean, abs=1e-2)


def test_a_failing_test_costs_only_itself(tmp_path, model, text_encoder, monkeypatch, capsys):
    def fail(bench):
        raise RuntimeError("out of luck")

    monkeypatch.setitem(evaluate.TESTS, "start", fail)
    assert not evaluate.evaluate(arguments(tmp_path, "--tests", "start,vae"), model, text_encoder)
    assert set(json.loads((tmp_path / "evaluation.json").read_text())["tests"]) == {"vae"}
    assert "out of luck" in capsys.readouterr().err


def test_wrong_input_is_named(model, text_encoder):
    with pytest.raises(ValueError, match="nonsense"):
        evaluate.chosen_tests("turn,nonsense")
    with pytest.raises(ValueError, match="at least 2"):
        make_bench(model, text_encoder, SEEDS[:1])
    guided = dataclasses.replace(model.config.val_scheduler_cfg, text_cfg_scale=5.0)
    config = dataclasses.replace(model.config, val_scheduler_cfg=guided)
    with pytest.raises(ValueError, match="guidance"):
        make_bench(World(config, model.transformer, model.vae, text_encoder), text_encoder, SEEDS)
    assert "drift" not in evaluate.chosen_tests("") and "drift" in evaluate.chosen_tests("all")


# --- photographs


def photo_bench(model, text_encoder) -> films.PhotoBench:
    """Two pictures of 2:1, of which the camera sees the middle two thirds; only beyond these they are red."""
    pixels = torch.randint(0, 255, (2, 40, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[..., 0] = 0
    pixels[:, :, :12] = pixels[:, :, -12:] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    atlas = make_atlas([Image.fromarray(p.numpy()) for p in pixels], (64, 128))
    return films.make_photo_bench(model, text_encoder, atlas)


def test_the_truth_is_right_on_photographs(model, text_encoder, monkeypatch):
    bench = photo_bench(model, text_encoder)
    for name, text in (
        ("photo_turn", f"right {CHUNK // 8}"),
        ("photo_return", f"right {CHUNK // 2}, left {CHUNK // 2}"),
    ):
        _, truth = evaluate._photo_walk(bench, text)
        monkeypatch.setattr(evaluate, "next_chunk", lambda *_, truth=truth: to_video(truth))
        figures, sheet = evaluate.run_test(name, [bench])
        assert figures["value"].mean > 40 and figures["sharpness"].mean == pytest.approx(1, abs=0.02)
        assert figures["value"].worlds == 2 and len(sheet) == 4


def test_only_what_the_photograph_showed_is_measured(model, text_encoder, monkeypatch):
    """With a turn of 24 degrees in a frame, a third of the picture is new and red."""
    monkeypatch.setattr("infworld.training.worlds.TURN", 20 * TURN)
    monkeypatch.setattr(evaluate, "TURN", 20 * TURN)
    bench, parts = photo_bench(model, text_encoder), []
    monkeypatch.setattr(evaluate, "_photo_outcome", lambda *args: parts.append(args))
    evaluate.measure_photo_turn(bench)
    _, _, truth, _, part = parts[0]
    height, width = part.shape[2:4]
    assert truth[:, 1, :, -4:, 0].float().mean() > 150
    assert part[..., 0].float().mean() < 12 and part[..., 1].float().mean() > 60
    assert width > 0.5 * WIDTH and height > 0.7 * HEIGHT


def test_photographs_are_asked_for_with_a_pack():
    assert not set(evaluate.chosen_tests("all")) & set(evaluate.PHOTO_TESTS)
    assert set(evaluate.chosen_tests("", photos=True)) > set(evaluate.PHOTO_TESTS)
    with pytest.raises(ValueError, match="need --photos"):
        evaluate.chosen_tests("photo_turn")
