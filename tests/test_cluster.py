"""Films on a cluster: real Ray workers on this machine's CPU, one of which is killed in the middle."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from infworld.cli import generate
from infworld.config import PROJECT_ROOT
from infworld.video import read_mp4

pytest.importorskip("ray")
FILMS, PATIENCE = 4, 600  # seconds; the machine may be busy


@pytest.fixture
def jobs(tmp_path, picture):
    lines = [
        {"image": str(picture), "out": f"{number}.mp4", "seed": number, "actions": "right 80", "frames": 81}
        for number in range(FILMS)
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def start(small_model, jobs, *options) -> subprocess.Popen:
    """`infworld generate --jobs` in the folder of the jobs."""
    command = [sys.executable, "-m", "infworld", "generate", "--model", str(small_model), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT_ROOT)}
    return subprocess.Popen(
        [*command, "--jobs", jobs.name, *options], cwd=jobs.parent, env=environment, stderr=subprocess.PIPE, text=True
    )


def workers(program: subprocess.Popen) -> list[psutil.Process]:
    """The processes in which films are made, as Ray names them."""
    found = []
    for process in psutil.Process(program.pid).children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith("ray::Filmmaker"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait(until, what: str):
    began = time.monotonic()
    while not (value := until()):
        assert time.monotonic() - began < PATIENCE, f"waited too long for {what}"
        time.sleep(0.05)
    return value


def test_a_killed_worker_costs_no_film_and_changes_none(small_model, jobs, tmp_path, world, monkeypatch):
    films = jobs.read_text()
    jobs.write_text("\n".join([json.dumps({"image": "gone.png", "out": "gone.mp4"}), films]))
    program = start(small_model, jobs, "--cluster", "--workers", "2")
    try:
        wait(lambda: list(tmp_path.glob("*.mp4")) or program.poll() is not None, "the first film")
        victims = [worker for worker in workers(program) if "make" in worker.cmdline()[0]] or workers(program)
        victims[0].kill()
        _, errors = program.communicate(timeout=PATIENCE)
    finally:
        program.kill()
    assert program.returncode == 2 and "job 1, gone.mp4" in errors and "no picture" in errors, errors
    assert errors.count("error:") == 1  # nothing else went wrong
    names = sorted(path.name for path in tmp_path.glob("*.mp4"))
    assert names == [f"{number}.mp4" for number in range(FILMS)]
    made = [read_mp4(tmp_path / name) for name in names]
    times = [(tmp_path / name).stat().st_mtime_ns for name in names]

    jobs.write_text(films)
    again = start(small_model, jobs, "--cluster", "auto")  # nothing is left to do, so that no cluster is looked for
    assert again.wait(PATIENCE) == 0
    assert [(tmp_path / name).stat().st_mtime_ns for name in names] == times

    for name in names:
        (tmp_path / name).unlink()
    monkeypatch.setattr(generate.infworld, "load", lambda *_, **__: world)  # here, one after the other
    monkeypatch.chdir(tmp_path)
    assert generate.main(["--model", str(small_model), "--device", "cpu", "--jobs", jobs.name]) == 0
    for name, frames in zip(names, made, strict=True):
        np.testing.assert_array_equal(read_mp4(tmp_path / name), frames)


@pytest.mark.parametrize("options", [["--cluster"], ["--workers", "2", "--jobs", "x"]])
def test_cluster_options_belong_to_jobs(options, capsys):
    with pytest.raises(SystemExit) as exit:
        generate.parse([*options, *([] if "--jobs" in options else ["--image", "a.png", "--out", "a.mp4"])])
    assert exit.value.code == 2


def test_a_cluster_that_is_not_there_is_said(small_model, jobs, capsys):
    arguments = ["--jobs", str(jobs), "--model", str(small_model), "--cluster", "auto", "--device", "cpu"]
    assert generate.main(arguments) == 2
    assert "no Ray cluster" in capsys.readouterr().err
