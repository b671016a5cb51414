"""Many films on a Ray cluster: a worker for each GPU that loads the model once, wherever in the cluster it is.

A film is the same wherever it is made, so a worker that dies costs only time: Ray starts it again and its film with it.
The films' folders, the pictures and the weights must be at the same paths on every host, as on a shared disk.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import infworld
from infworld.cli.console import FAILED, StopSignals
from infworld.cli.film import FilmPlan, film
from infworld.cli.jobs import PATHS, WRONG, Job, check_jobs, left_to_make, read_jobs
from infworld.config import MODELS, PROJECT_ROOT
from infworld.devices import limit_memory, pick_device
from infworld.models import default_model, lora_files, prepare, with_loras

RETRIES = 3  # of a film whose worker died
PATIENCE = 1.0  # seconds between looks at what is finished, in which Ctrl-C waits


class Filmmaker:
    """A worker: a loaded model that makes one film after the other."""

    def __init__(self, model: str, loras: list[str], device: str, memory_gb: float | None):
        began = time.monotonic()
        limit_memory(pick_device(device), memory_gb)
        self._world = infworld.load(with_loras(prepare(model), loras), device)
        self._loading = time.monotonic() - began

    def make(self, job: Job) -> str:
        """Makes a film; returns what went wrong, or ""."""
        try:
            plan = FilmPlan.of(job.args)
            with plan.claimed():
                film(plan, self._world, self._loading, StopSignals())
        except WRONG as error:
            return f"{job.where}: {error}"
        return ""


def generate_on_cluster(args: argparse.Namespace, stop: StopSignals) -> int:
    """Makes all films of a jobs file that are not there yet; returns the exit code.

    Raises ValueError or OSError for a file that cannot be read, and where there is no Ray or no cluster.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--cluster needs Ray: pip install 'infworld[cluster]'") from error
    args.model, args.lora = _everywhere(args.model or default_model(args.device)), lora_files(args.lora)
    jobs, problems = check_jobs(*read_jobs(Path(args.jobs).expanduser(), args))
    jobs = [Job(job.where, _with_whole_paths(job.args)) for job in jobs]
    left = left_to_make(jobs)
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), unit="film", dynamic_ncols=True) as bar:
        for problem in _make(ray, args, left, stop) if left else ():
            problems += [problem] if problem else []
            bar.update()
    print(*(f"error: {problem}\n" for problem in problems), sep="", end="", file=sys.stderr)
    return FAILED if problems else 0


def _make(ray, args: argparse.Namespace, jobs: list[Job], stop: StopSignals) -> Iterator[str]:
    """Makes the films of jobs; yields, as each is finished, what went wrong with it, or ""."""
    from ray.util import ActorPool

    _connect(ray, args.cluster)
    try:
        pool = ActorPool(_workers(ray, args, len(jobs)))
        for job in jobs:
            pool.submit(lambda worker, job: worker.make.remote(job), job)
        while pool.has_next():
            stop.check()
            try:
                yield pool.get_next_unordered(timeout=PATIENCE)
            except TimeoutError:
                continue
            except ray.exceptions.RayError as error:
                yield f"a film was lost with its worker: {error}"
    finally:
        ray.shutdown()


def _connect(ray, address: str) -> None:
    """To the cluster at an address, "auto" being the one of this host; "local" starts one here."""
    try:
        # Workers find the package of a clone as this process does, and take as many threads as it.
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))}
        variables |= {name: os.environ[name] for name in ("OMP_NUM_THREADS", "INFWORLD_MODEL") if name in os.environ}
        options = {"include_dashboard": False} if address == "local" else {}
        ray.init(address, log_to_driver=False, runtime_env={"env_vars": variables}, **options)
    except (ConnectionError, RuntimeError) as error:
        raise ValueError(f"there is no Ray cluster at {address!r}: {error}") from error


def _workers(ray, args: argparse.Namespace, films: int) -> list:
    """As many as there are GPUs in the cluster, or as asked for; no more than films."""
    resources = ray.cluster_resources()
    gpus = 0 if args.device == "cpu" else int(resources.get("GPU", 0))
    count = max(1, min(args.workers or gpus or 1, films))
    needs = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, int(resources.get("CPU", 1)) // count)}
    maker = ray.remote(Filmmaker).options(**needs, max_restarts=-1, max_task_retries=RETRIES)
    return [maker.remote(args.model, args.lora, args.device, args.memory_gb) for _ in range(count)]


def _with_whole_paths(args: argparse.Namespace) -> argparse.Namespace:
    """The same options with every path from the root on, as workers have folders of their own."""
    values = vars(args).copy()
    for name in PATHS & {name for name, value in values.items() if value}:
        values[name] = str(Path(values[name]).expanduser().absolute())
    if isinstance(args.actions, str) and args.actions.lower().endswith(".json"):
        values["actions"] = str(Path(args.actions).expanduser().absolute())
    return argparse.Namespace(**values)


def _everywhere(model: str) -> str:
    """A model's name, or its config's path from the root on."""
    return model if model in MODELS else str(Path(model).expanduser().absolute())
