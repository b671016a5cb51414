"""Films a walk from the command line: a picture and actions in, an mp4 out. Ctrl-C keeps what has been made.

python scripts/generate.py --image PICTURE --actions "forward 80, right 80" --frames 161 --out film.mp4

On a host with N GPUs, `torchrun --nproc-per-node N scripts/generate.py ...` makes one film on all of them, and with
`--jobs FILE` many films, each on one.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import infworld
from infworld import hub, parallel
from infworld.actions import ActionScript
from infworld.cli.console import FAILED, INTERRUPTED, exit_code
from infworld.config import load_config
from infworld.devices import device_name, limit_memory, peak_memory, pick_device
from infworld.memory_plan import FASTEST, GB, NotEnoughMemory
from infworld.models import default_model, prepare
from infworld.pictures import load_image
from infworld.presets import PRESETS, find_preset
from infworld.video import Mp4Writer, check_output


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    program = generate_all if args.jobs else generate
    return exit_code(lambda: program(args), "stopped before the first frame", quiet=parallel.rank() != 0)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Film a walk from one picture and a list of actions.")
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--image", help="the picture to begin with")
    begin.add_argument("--resume", metavar="SESSION", help="a saved session to go on from")
    begin.add_argument(
        "--jobs",
        metavar="FILE",
        help="many films: a JSON list, or a line for each, of objects with the options of one film, as "
        '{"image": "a.png", "out": "a.mp4"}; what they leave out is as on the command line',
    )
    parser.add_argument("--actions", help="JSON file, or text such as 'forward 80, right 40'; default: no action")
    parser.add_argument("--frames", type=int, default=161, help="length of the whole film: 81, 161 (default), 241, ...")
    parser.add_argument("--out", help="the mp4 to write")
    parser.add_argument("--session", metavar="FILE", help="save the session here (.safetensors), to resume later")
    parser.add_argument(
        "--model",
        help="infinite-world, tiny, or the path of a YAML file; missing weights are downloaded. Default: the resumed "
        "session's, else INFWORLD_MODEL, else infinite-world if its weights and a GPU it fits on are here, else tiny",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="for long films on a GPU: faster, after a slow start")
    parser.add_argument(
        "--memory-gb", type=float, help="take at most so many GB (10^9 bytes) of the GPU; default: what is free of it"
    )
    parser.add_argument("--prompt", help="what the world looks like")
    parser.add_argument("--negative-prompt", help="what to avoid, where the model uses guidance")
    parser.add_argument("--seed", type=int, help="another number, another film (default 0)")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        help="exact, or faster and less exact (docs/performance.md); default: the model's own",
    )
    parser.add_argument("--steps", type=int, help="sampler steps per chunk; default: the preset's")
    parser.add_argument("--guidance", type=float, help="how closely to follow the prompt; default: the model's own")
    args = parser.parse_args(arguments)
    if not args.out and not args.jobs:
        parser.error("the following arguments are required: --out")
    return args


@dataclass(frozen=True)
class FilmPlan:
    """What the film of `args` begins with, checked as far as it can be without the model."""

    args: argparse.Namespace
    out: Path
    session_path: Path
    script: ActionScript
    picture: Image.Image | None
    session: infworld.Session | None
    model: str
    chunks: int

    @staticmethod
    def of(args: argparse.Namespace) -> FilmPlan:
        out = check_output(args.out)
        session_path = check_output(args.session or out.with_suffix(".session.safetensors"), ".safetensors")
        script = ActionScript.of(args.actions)
        picture = None if args.resume else load_image(args.image)
        session = resumed(args) if args.resume else None
        name = args.model or (session.model if session else default_model(parallel.device_of_rank(args.device)))
        chunks = load_config(name).chunks_for(args.frames)
        if session is not None and session.num_frames >= args.frames:
            raise ValueError(f"the session has {session.num_frames} frames already: ask for more with --frames")
        return FilmPlan(args, out, session_path, script, picture, session, name, chunks)

    def begin(self, world: infworld.World) -> infworld.Session:
        """The session to go on from."""
        if self.session is not None:
            return self.session
        args = self.args
        named = ("negative_prompt", "steps", "guidance", "preset")
        settings = {name: getattr(args, name) for name in named}
        return world.start(self.picture, self.script, args.prompt or "", seed=args.seed or 0, **settings)


def generate(args: argparse.Namespace) -> int:
    """Makes the film that `args` ask for; returns the exit code. What cannot work fails before the model is loaded."""
    plan = FilmPlan.of(args)
    device = parallel.device_of_rank(args.device)
    with parallel.join_team(pick_device(device)) as team:
        config = prepare(plan.model) if team is None else team.broadcast_from_rank0(lambda: prepare(plan.model))
        began = time.monotonic()
        limit_memory(pick_device(device), args.memory_gb)
        world = infworld.load(config, device, compile=args.compile, team=team)
        loading = time.monotonic() - began
        return film(plan, world, loading) if team is None or team.is_rank0 else follow(plan, world)


def film(plan: FilmPlan, world: infworld.World, loading: float) -> int:
    """Films and reports; returns the exit code. loading: the seconds it took to load the model.

    In a team every chunk's session is saved, as any process can be lost at any time.
    """
    began, team = time.time(), world.team
    session = plan.begin(world)
    interrupted, problem = False, ""
    if world.plan != FASTEST:
        print(f"there is too little GPU memory for all at once: {world.plan}")
    with (
        team.defer_signals() if team else nullcontext(),
        Mp4Writer(plan.out, world.config.validation_data.fps) as mp4,
        BackgroundWriter(mp4, plan.session_path if team else None) as writer,
    ):
        if team:
            team.if_lost(lambda: f"{writer.rescue()}{how_to_go_on(plan, began)}")
        try:
            for chunk in world.replay(session):
                writer.write(chunk.frames)
            with Bar(session.settings.steps, plan.chunks - len(session.chunk_latents)) as bar:
                for chunk in world.extend(session, bar.chunks, bar.show):
                    session = chunk.session
                    writer.write(chunk.frames, session)
        except KeyboardInterrupt:
            interrupted = True
        except NotEnoughMemory as error:
            problem = str(error)
    keep = plan.args.session or interrupted or problem or team
    report(mp4, session, plan.session_path if keep else None, bool(interrupted or problem))
    devices = f"{team.size} x " if team else ""
    print(
        f"{world.config.name} on {devices}{device_name(world.device)}: loaded in {loading:.1f} s, "
        f"filmed in {time.time() - began:.1f} s, peak memory {peak_memory(world.device)}{planned(world)}"
    )
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return FAILED
    return INTERRUPTED if interrupted else 0


def planned(world: infworld.World) -> str:
    """What of a GPU the plan meant to take at most, for comparison."""
    return (
        f" (GPU planned {world.memory_estimate().gpu(world.plan) / GB:.1f} GB)" if world.device.type == "cuda" else ""
    )


def follow(plan: FilmPlan, world: infworld.World) -> int:
    """What the other processes of a team do: the same work, without showing or keeping anything."""
    began = time.time()
    world.team.if_lost(lambda: how_to_go_on(plan, began))
    with suppress(parallel.Abandoned, NotEnoughMemory):
        session = plan.begin(world)
        for _ in world.replay(session):
            pass
        for _ in world.extend(session, plan.chunks - len(session.chunk_latents)):
            pass
    return 0


def how_to_go_on(plan: FilmPlan, began: float) -> str:
    """After a process was lost: where the film is, if any of it was saved since `began` (of `time.time`)."""
    path = plan.session_path
    if path.exists() and path.stat().st_mtime >= began:
        return f"the film so far is saved; go on with: --resume {path} --frames {plan.args.frames}"
    return "no chunk was finished"


def generate_all(args: argparse.Namespace) -> int:
    """Makes this process's share of many films, one after the other; returns the exit code.

    A film that cannot be made is named, and the others are made. ValueError for a list that cannot be read.
    """
    jobs = read_jobs(args)
    name = args.model or default_model(parallel.device_of_rank(args.device))
    if parallel.world_size() > 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # when another process ends, keep what there is
        if not hub.find(load_config(name)):
            raise ValueError(f"the files of {name} are not here: get them first with scripts/download.py")
    began = time.monotonic()
    limit_memory(pick_device(parallel.device_of_rank(args.device)), args.memory_gb)
    world = infworld.load(prepare(name), parallel.device_of_rank(args.device), compile=args.compile, team=None)
    loading = time.monotonic() - began
    failed = 0
    for job in jobs[parallel.rank() :: parallel.world_size()]:
        try:
            code = film(FilmPlan.of(job), world, loading)
            if code == INTERRUPTED:
                return INTERRUPTED
            failed += code != 0
        except (ValueError, OSError) as error:
            failed += 1
            print(f"error: {job.out}: {error}", file=sys.stderr)
    return FAILED if failed else 0


def read_jobs(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The jobs of `args.jobs`, each with all options of one film."""
    text = Path(args.jobs).read_text(encoding="utf-8")
    try:
        jobs = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{args.jobs} is neither a JSON list nor a JSON object on each line: {error}") from error
    known = vars(args).keys() - {"jobs", "model", "device", "compile", "memory_gb"}
    for number, job in enumerate(jobs, 1):
        if not isinstance(job, dict) or not job.keys() <= known:
            raise ValueError(f"{args.jobs}: job {number} must be an object with {', '.join(sorted(known))}, not {job}")
        if "out" not in job or ("image" in job) == ("resume" in job):
            raise ValueError(f"{args.jobs}: job {number} needs out, and image or resume")
    return [argparse.Namespace(**{**vars(args), **job}) for job in jobs]


def resumed(args: argparse.Namespace) -> infworld.Session:
    """The saved session, with what the command line changes for the frames to come."""
    session = infworld.Session.load(args.resume)
    if args.actions is not None:
        session = session.with_actions(args.actions)
    if args.prompt is not None or args.negative_prompt is not None:
        session = session.with_prompt(
            session.settings.prompt if args.prompt is None else args.prompt, args.negative_prompt
        )
    if args.seed is not None:
        session = session.with_seed(args.seed)
    steps = args.steps
    if args.preset is not None and steps is None:
        steps = find_preset(args.preset).sampler_steps(load_config(args.model or session.model).val_scheduler_cfg)
    changes = {"steps": steps, "guidance": args.guidance, "preset": args.preset}
    changes = {name: value for name, value in changes.items() if value is not None}
    return session.replace_settings(**changes)


class BackgroundWriter:
    """Writes a film's frames in another thread, so that the next chunk does not wait for them.

    What goes wrong there is raised by the next `write`, or at the end. session_path: where the sessions that come with
    frames are saved, if they shall be.
    """

    def __init__(self, film: Mp4Writer, session_path: Path | None = None):
        self._film = film
        self._session_path = session_path
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind, *exception) -> None:
        self._thread.shutdown()
        if kind is None:
            self._finish()

    def write(self, frames: np.ndarray, session: infworld.Session | None = None) -> None:
        self._finish()
        self._writing = self._thread.submit(self._write, frames, session)

    def rescue(self) -> str:
        """Ends the film as it is, from any thread; says where it is."""
        self._thread.shutdown()
        self._film.close()
        return f"{self._film.path} has {self._film.frames} frames; " if self._film.frames else ""

    def _write(self, frames: np.ndarray, session: infworld.Session | None) -> None:
        if session is not None and self._session_path is not None:
            session.save(self._session_path)
        self._film.write(frames)

    def _finish(self) -> None:
        if self._writing is not None:
            self._writing.result()


class Bar:
    """A progress bar over all sampler steps, with chunk, step and the time left."""

    def __init__(self, steps: int, chunks: int):
        self.chunks = chunks
        self._bar = tqdm(total=steps * chunks, bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} {elapsed}{postfix}")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception) -> None:
        self._bar.close()

    def show(self, progress: infworld.Progress) -> None:
        """A rollout's callback."""
        self._bar.set_description_str(f"chunk {progress.chunk}/{progress.chunks} step {progress.step}/{progress.steps}")
        if progress.remaining is not None:
            self._bar.set_postfix_str(f"{tqdm.format_interval(progress.remaining)} left", refresh=False)
        self._bar.update((progress.chunk - 1) * progress.steps + progress.step - self._bar.n)


def report(film: Mp4Writer, session: infworld.Session, session_path: Path | None, interrupted: bool) -> None:
    """Says what there is now and how to go on; saves the session if there is a place for it."""
    if film.frames:
        stopped = "stopped: " if interrupted else ""
        seconds = film.frames / film.fps
        print(f"{stopped}{film.path} has {film.frames} frames ({seconds:.1f} s), seed {session.settings.seed}")
    if session_path is not None:
        session.save(session_path)
        print(f"go on with: --resume {session_path} --frames {session.num_frames + 160}")


if __name__ == "__main__":
    sys.exit(main())
