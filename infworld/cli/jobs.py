"""Many films, one after the other, as a file lists them; with torchrun each process makes its share."""

from __future__ import annotations

import argparse
import json
import os
import reprlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from imageio_ffmpeg import count_frames_and_secs
from tqdm import tqdm

import infworld
from infworld import hub, parallel
from infworld.cli.console import FAILED, StopSignals
from infworld.cli.film import FilmPlan, film, unknown_homes
from infworld.config import load_config
from infworld.devices import limit_memory, pick_device
from infworld.files import read_json_text
from infworld.memory_plan import NotEnoughMemory
from infworld.models import default_model, lora_files, prepare, with_loras

OF_ALL = {
    "jobs",
    "model",
    "lora",
    "device",
    "memory_gb",
    "cluster",
    "workers",
}  # options that hold for all films together
PATHS = {"image", "resume", "out", "session"}
WRONG = (ValueError, OSError, NotEnoughMemory)  # ends one film


@dataclass(frozen=True)
class Job:
    """One film to make. where: its place in the file, in words."""

    where: str
    args: argparse.Namespace


def generate_all(args: argparse.Namespace, stop: StopSignals) -> int:
    """Makes this process's share of many films; returns the exit code.

    All are checked before the first is made. One that cannot be made is named, and the others are made; films that are
    `finished` are not made again. Raises ValueError or OSError for a file that cannot be read.
    """
    device = parallel.device_of_rank(args.device)
    name = args.model or default_model(device)
    with unknown_homes():
        config, path = load_config(name), Path(args.jobs).expanduser()
    jobs, problems = check_jobs(*read_jobs(path, argparse.Namespace(**{**vars(args), "model": name})))
    if parallel.rank() == 0:
        print(*(f"error: {problem}\n" for problem in problems), sep="", end="", file=sys.stderr)
    failed = parallel.rank() == 0 and bool(problems)
    loras = lora_files(args.lora) if jobs else []  # a wrong one is said even if nothing is left to film
    share = left_to_make(jobs[parallel.rank() :: parallel.world_size()])
    if share:
        if parallel.world_size() > 1 and not hub.find(config):
            raise ValueError(f"the files of {name} are not here: get them first with `infworld download`")
        began = time.monotonic()
        limit_memory(pick_device(device), args.memory_gb)
        world = infworld.load(with_loras(prepare(name), loras), device)
        loading = time.monotonic() - began
    began = time.monotonic()
    for made, job in enumerate(share):
        spent = time.monotonic() - began
        left = f", {tqdm.format_interval(spent / made * (len(share) - made))} left" if made else ""
        print(f"film {made + 1} of {len(share)}{left}")
        try:
            plan = FilmPlan.of(job.args)
            with plan.claimed():
                if code := film(plan, world, loading, stop):
                    return code
        except WRONG as error:
            failed = True
            print(f"error: {job.where}: {error}", file=sys.stderr)
    wait_for_others()
    return FAILED if failed else 0


def read_jobs(path: Path, args: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """The jobs of a file, each with all options of one film, and what is wrong with the others."""
    if not path.is_file():
        raise FileNotFoundError(f"no jobs file at {path}")
    try:
        text = read_json_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error}") from error
    jobs, problems = [], []
    for where, entry in entries(path, text):
        try:
            jobs.append(job_of(where, entry, args))
        except ValueError as error:
            problems.append(str(error))
    if not jobs and not problems:
        raise ValueError(f"{path} lists no films")
    return jobs, problems


def entries(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Each entry with its place in words; in a file of lines, still as text."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{path} is neither a JSON list nor a JSON object on each line: {error}") from error
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        yield from ((f"{path}, line {line}: job {job}", text) for job, (line, text) in enumerate(lines, 1))
    else:
        whole = whole if isinstance(whole, list) else [whole]
        yield from ((f"{path}: job {number}", entry) for number, entry in enumerate(whole, 1))


def job_of(where: str, entry: object, args: argparse.Namespace) -> Job:
    """What an entry asks for. Raises ValueError for one that no film can be made of."""
    if isinstance(entry, str):
        try:
            entry = json.loads(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
    known = vars(args).keys() - OF_ALL
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise ValueError(f"{where} must be an object with {', '.join(sorted(known))}, not {reprlib.repr(entry)}")
    entry = {name: value for name, value in entry.items() if value is not None}
    if "out" not in entry or ("image" in entry) == ("resume" in entry):
        raise ValueError(f"{where} needs out, and image or resume")
    for name in PATHS & entry.keys():
        if not isinstance(entry[name], str) or not entry[name]:
            raise ValueError(f"{where}: {name} must be a path in quotes, not {reprlib.repr(entry[name])}")
    return Job(f"{where}, {entry['out']}", argparse.Namespace(**{**vars(args), **entry}))


def check_jobs(jobs: list[Job], problems: list[str]) -> tuple[list[Job], list[str]]:
    """The jobs that can be made, and what is wrong with the others besides `problems`."""
    good, writers = [], defaultdict(list)
    for job in jobs:
        try:
            plan = FilmPlan.of(job.args)
        except WRONG as error:
            problems = [*problems, f"{job.where}: {error}"]
        else:
            good.append(job)
            for path in (plan.out, plan.session_path):
                writers[os.path.normcase(os.path.realpath(path))].append(job.where)
    clashes = {tuple(places): path for path, places in writers.items() if len(places) > 1}
    for places, path in clashes.items():
        problems = [*problems, f"{' and '.join(places)}: they would all write {path}"]
        good = [job for job in good if job.where not in places]
    return good, problems


def left_to_make(jobs: list[Job]) -> list[Job]:
    """The jobs whose films are not `finished`; says how many are."""
    left = [job for job in jobs if not finished(FilmPlan.of(job.args))]
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} films are there already and stay; delete one to have it made again")
    return left


def finished(plan: FilmPlan) -> bool:
    """Whether the film is there with all its frames. One that was stopped has fewer."""
    return plan.out.is_file() and count_frames_and_secs(str(plan.out))[0] == plan.frames


def wait_for_others() -> None:
    """Waits for the other processes' films, as torchrun ends them all as soon as one fails."""
    if parallel.world_size() > 1 and dist.is_torchelastic_launched():
        store, _, size = next(dist.rendezvous("env://"))
        store.add("finished", 1)
        while store.add("finished", 0) < size:
            time.sleep(0.5)
