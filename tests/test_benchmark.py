"""`infworld benchmark`: every figure is there, the fast way equals the plain one, and a short budget is kept."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infworld.cli.benchmark import run as benchmark
from infworld.cli.benchmark import team
from infworld.cli.benchmark.model import noise, noise_session, picture_size, plain_velocity, random_world
from infworld.cli.benchmark.record import Record, goals, number, table
from infworld.config import load_config


def run(tmp_path, model, *arguments) -> dict:
    out = tmp_path / "benchmark.json"
    settings = ["--device", "cpu", "--guidance", "3", "--steps", "2", "--chunks", "2", "--histories", "1,101"]
    assert benchmark.main(["--model", str(model), "--out", str(out), *settings, *arguments]) == 0
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(small_model, tmp_path_factory) -> dict:
    """Of every part."""
    parts = ",".join(benchmark.PARTS)
    return run(tmp_path_factory.mktemp("benchmark"), small_model, "--budget", "300", "--parts", parts)


def test_every_figure_is_there(results):
    found = results["figures"].keys()
    expected = {
        "ceiling: copy",
        "ceiling: matrix product",
        "ceiling: attention, flash",
        "exact: share of the ceilings in a step, longest history",
        *(f"{way}: step, history {history}" for way in ("exact", "naive") for history in (1, 21, 101)),
        *(f"exact: prepare, history {history}" for history in (1, 21, 101)),
        *(f"{way}: {what} a chunk" for way in ("exact", "naive") for what in ("decode", "encode")),
        *(f"{way}: film" for way in ("exact", "naive")),
        *(f"{preset}: chunk, longest history" for preset in ("exact", "balanced", "fast")),
        *(f"{preset}: {what}" for preset in ("balanced", "fast") for what in ("film", "deviation from exact")),
        "exact: film, measured",
        "exact: encoder state of a session",
        "error of a chunk, float32 at small size",
        "error of a chunk, float32",
        "vae quality: float32 against the film",
        "choice: step with both texts as a batch",
        "choice: projections q, k, v of one block as one",
        "choice: projections q, k, v of one block as three",
        "exact: step, longest history, once more at the end",
        *(f"plain torch: {what}" for what in ("step, history 101", "decode a chunk", "encode a chunk")),
        *(
            f"{way}: {name}"
            for way in ("kernel", "plain torch")
            for name in ("modulate_both", "affine_gelu", "normalize")
        ),
        "kernels: error of a chunk",
    }
    assert expected <= found
    assert results["left out"] == {"small cards": "only a GPU's memory can be limited"}
    same = {name for name, figure in results["figures"].items() if not figure["value"] > 0}
    assert same == {"kernels: error of a chunk", "kernels: error of a chunk's frames"}  # on a CPU there are no kernels
    assert len(results["profiles"]) == 4


def test_the_fast_way_equals_the_plain_one(results):
    figures = results["figures"]
    assert figures["error of a chunk, float32 at small size"]["value"] < 1e-4
    assert figures["error of a chunk, float32"]["value"] < 1e-4


def test_the_fast_way_has_less_to_do(small_model):
    """By far, as the naive one compresses 101 latents of history at every step. Counted, as times depend on the day."""
    config = load_config(small_model)
    world, _ = random_world(config, torch.device("cpu"), torch.float32, torch.float32)
    session = noise_session(world, picture_size(config), 101).replace_settings(guidance=3.0)
    z, t = noise(config, picture_size(config), config.chunk_latents), torch.tensor(900.0)

    def work(velocity) -> int:
        with FlopCounterMode(display=False) as counter:
            velocity(z, t)
        return counter.get_total_flops()

    assert work(plain_velocity(world, session)) / work(world.velocity(session)) > 100


def test_a_film_is_the_sum_of_its_chunks(results):
    value = {name: figure["value"] for name, figure in results["figures"].items()}
    chunks = [
        2 * value[f"exact: step, history {h}"] + value[f"exact: prepare, history {h}"] for h in (1, 21)
    ]  # of two steps each
    stages = 2 * (value["exact: decode a chunk"] + value["exact: encode a chunk"])
    assert value["exact: film"] == pytest.approx(sum(chunks) + stages)
    # Naive: the first chunk encodes one frame, the second 81.
    stages = 2 * value["naive: decode a chunk"] + (1 + 1 / 81) * value["naive: encode a chunk"]
    steps = 2 * (value["naive: step, history 1"] + value["naive: step, history 21"])
    assert value["naive: film"] == pytest.approx(steps + stages)


def test_the_record_says_how_it_was_made(results, small_model):
    assert results["command"].startswith(f"infworld benchmark --model {small_model}")
    assert results["machine"].keys() >= {"device", "torch", "Python"}
    assert results["settings"]["transformer"] == "float32" and results["settings"]["longest history"] == 101


def test_without_time_everything_is_named_as_left_out(small_model, tmp_path):
    results = run(tmp_path, small_model, "--budget", "1", "--parts", "steady,vae,chunk,film")
    assert not any(name.startswith(("exact: step", "naive: step")) for name in results["figures"])
    assert {"exact: step, history 101", "exact: chunk, longest history", "exact: film"} <= results["left out"].keys()


def test_unknown_parts_and_histories_are_named(small_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--parts", "steady,dreams"])
    assert "unknown part 'dreams'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a history has 1 . 20 n latents, not 30"):
        run(tmp_path, small_model, "--histories", "30", "--parts", "steady")


def test_the_table_has_every_goal_and_figure(results, tmp_path, capsys):
    text = table(results)
    assert all(f"| {name} | " in text for name in results["figures"])
    assert all(f"| {what} | {number(found)} | " in text for what, found, *_ in goals(results))
    page = tmp_path / "page.md"
    record = Record(tmp_path / "b.json", 10, {key: results[key] for key in ("command", "machine", "settings")})
    record.results |= results
    record.write()
    assert benchmark.main(["--table", str(tmp_path / "b.json"), "--docs", str(page)]) == 0
    assert page.read_text().splitlines()[0] == f"# small on {results['machine']['device']}"
    assert text[text.index("| goal |") :] in page.read_text()


def test_a_goal_is_reached_from_the_right_side():
    figures = {
        "naive: step, history 241": 5.0,
        "exact: step, history 241": 2.0,
        "exact: peak memory of a chunk": 23.0,
        "error of a chunk, bfloat16": 0.03,
    }
    results = {"settings": {"longest history": 241}, "figures": {n: {"value": v} for n, v in figures.items()}}
    reached = {what: ok for what, _, _, ok in goals(results)}
    assert reached == {
        "steady step, naive / exact": False,
        "peak GPU memory of a chunk, GiB": True,
        "error of a chunk's latents, bfloat16": False,
    }


def team_results(model, out, *arguments, processes: int = 1) -> dict:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = ["--model", str(model), "--device", "cpu", "--out", str(out), *arguments]
    command = [sys.executable, *launcher, "-m", "infworld", "benchmark", "team", *options]
    subprocess.run(command, check=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return json.loads(out.read_text())


def test_films_on_several_devices_are_measured_whole(small_model, tmp_path):
    """And a chunk is compared with one device's."""
    options = ["--presets", "fast,exact", "--history", "21", "--chunks", "3", "--steps", "1"]
    results = team_results(small_model, tmp_path / "team.json", *options, processes=2)
    value = {name: figure["value"] for name, figure in results["figures"].items()}
    for preset in ("fast", "exact"):
        chunks = [value[f"{preset}: chunk {i} of the film"] for i in (1, 2, 3)]
        assert value[f"{preset}: film on 2"] == pytest.approx(sum(chunks))
        times = value[f"{preset}: chunk on one"] / value[f"{preset}: chunk on 2"]
        assert value[f"{preset}: chunk, times as fast as on one"] == pytest.approx(times)
        assert value[f"{preset}: error of a chunk"] < 1e-4
    assert "decode" in results["figures"]["fast: chunk on 2"]["note"]
    assert results["command"].startswith("torchrun --nproc-per-node 2 -m infworld benchmark team")
    assert "| fast: film on 2 | " in table(results)


def test_a_film_beyond_a_full_memory_is_estimated_and_one_without_time_left_out(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr("infworld.cli.benchmark.team.memory_latents", lambda history: min(history, 21))
    out = tmp_path / "one.json"
    options = ["--model", str(small_model), "--device", "cpu", "--out", str(out), "--chunks", "4", "--presets"]
    monkeypatch.setattr("sys.argv", ["infworld benchmark team", *options, "exact,balanced"])
    team.main()
    figures = json.loads(out.read_text())["figures"]
    assert "exact: chunk 4 of the film" in figures and "exact: chunk on one" not in figures
    chunks = [figures[f"balanced: chunk {i} of the film"]["value"] for i in (1, 2)]
    assert figures["balanced: film on 1"]["value"] == pytest.approx(chunks[0] + 3 * chunks[1])
    assert figures["balanced: film on 1"]["note"] == "2 chunks measured, 2 more like the last of them"
    monkeypatch.setattr("sys.argv", ["infworld benchmark team", *options, "exact", "--budget", "1"])
    team.main()
    assert json.loads(out.read_text())["left out"] == {"exact: film on 1": "only 0 chunks in the time that was left"}


def test_four_devices_have_goals_of_their_own():
    figures = {"exact: chunk, times as fast as on one": 3.7, "fast: film on 4": 56.0}
    results = {"settings": {"longest history": 101, "devices": 4}}
    results["figures"] = {name: {"value": value} for name, value in figures.items()}
    reached = {what: ok for what, _, _, ok in goals(results)}
    assert reached == {"four devices, exact": True, "fast film on four devices, s": False}
