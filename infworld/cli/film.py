"""One film of the command line: its plan, checked before the model is loaded, and its making."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import infworld
from infworld import parallel
from infworld.cli.console import FAILED, StopSignals, stop_code
from infworld.cli.film_writer import Bar, FilmWriter, describe
from infworld.config import ModelConfig, load_config
from infworld.devices import device_name, peak_memory
from infworld.files import check_output, claimed, remove_leftovers, session_beside
from infworld.memory_plan import FASTEST, GB, NotEnoughMemory
from infworld.models import default_model
from infworld.pictures import load_image
from infworld.session import check_session
from infworld.settings import FilmSettings
from infworld.video import JoinedMp4Writer

SESSION = ".safetensors"
LORA_OPTION: dict[str, Any] = {
    **{"action": "append", "default": [], "metavar": "FILE[:WEIGHT]"},
    "help": "a LoRA to merge into the model, a .safetensors file or USER/NAME of the Hub; may be given several times",
}


@contextmanager
def unknown_homes() -> Iterator[None]:
    """A path such as `~nobody/film.mp4` is an error of who wrote it; pathlib raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"a path begins with ~ and a user who has no home here: {error}") from error


@dataclass(frozen=True)
class FilmPlan:
    """What the film of `args` begins with, checked as far as it can be without the model.

    session: the film goes on from it; else it begins with picture and settings. keeps_session: it stays when the film
    is finished.
    """

    args: argparse.Namespace
    out: Path
    session_path: Path
    keeps_session: bool
    model: str
    config: ModelConfig
    frames: int
    chunk_frames: int
    picture: Image.Image | None
    settings: FilmSettings | None
    session: infworld.Session | None

    @staticmethod
    @unknown_homes()
    def of(args: argparse.Namespace) -> FilmPlan:
        """Raises ValueError or OSError for all that cannot work."""
        out = check_output(args.out)
        session_path = check_output(args.session or session_beside(out), SESSION)
        session = None if args.resume is None else infworld.Session.load(args.resume)
        model = args.model or (session.model if session else default_model(parallel.device_of_rank(args.device)))
        config = load_config(model)
        picture = settings = None
        if session is not None:
            check_session(session, config)
            session = changed(session, args, config)
        else:
            picture, settings = load_image(args.image), FilmSettings.for_model(config, **asked(args))
        chunk_frames = config.check_chunk_frames(args.chunk_frames)
        two_chunks = 2 * config.chunk_frames  # of the model's own length, in whole chunks of this one
        frames = 1 + -(-two_chunks // chunk_frames) * chunk_frames if args.frames is None else args.frames
        chunks_to_make(config, frames, 1 if session is None else session.num_frames, chunk_frames)
        if session is not None and (session.num_frames > frames or (session.num_frames == frames and out.exists())):
            raise ValueError(
                f"the session has {session.num_frames} frames already: ask for more with --frames; or write these "
                "again, with as many --frames and another --out"
            )
        kept = args.resume is not None and os.path.realpath(args.resume) == os.path.realpath(session_path)
        keeps = bool(args.session) or kept
        return FilmPlan(args, out, session_path, keeps, model, config, frames, chunk_frames, picture, settings, session)

    def begin(self, world: infworld.World) -> infworld.Session:
        """The session to go on from."""
        return world.start(self.picture, self.settings) if self.session is None else self.session

    def chunks_after(self, session: infworld.Session) -> int:
        """How many chunks are still to be made."""
        return chunks_to_make(self.config, self.frames, session.num_frames, self.chunk_frames)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Within it no other run writes the same files; ValueError if one does."""
        with ExitStack() as claims:
            for path in (self.out, self.session_path):
                claims.enter_context(claimed(path))
            yield

    def next_command(self, session_path: Path, frames: int) -> str:
        """The command that goes on from a session when the mp4 has so many frames: to the length that was asked for,
        or two chunks more."""
        frames = self.frames if frames < self.frames else self._longer()
        args, program = self.args, ["infworld", "generate"]
        if parallel.world_size() > 1 and args.jobs is None:
            program = ["torchrun", "--nproc-per-node", str(parallel.world_size()), "-m", *program]
        words = ["--resume", _word(session_path), "--frames", str(frames), "--out", _word(self.out)]
        device = None if args.device == "auto" else args.device
        given = {"--session": args.session, "--chunk-frames": args.chunk_frames, "--model": args.model}
        given |= {"--device": device, "--memory-gb": args.memory_gb}
        for name, value in given.items():
            words += [] if value is None else [name, _word(value)]
        words += [word for lora in args.lora for word in ("--lora", _word(lora))]
        return shlex.join([*program, *words])

    def _longer(self) -> int:
        longest = self.frames + (self.config.max_frames - self.frames) // self.chunk_frames * self.chunk_frames
        return min(self.frames + 2 * self.chunk_frames, longest)


def chunks_to_make(config: ModelConfig, frames: int, made: int, per_chunk: int) -> int:
    """Chunks of `per_chunk` new frames from a film of `made` frames to one of `frames`. Raises ValueError if they are
    not whole chunks."""
    if (made - 1) % per_chunk == 0:
        return config.chunks_for(frames, per_chunk) - (made - 1) // per_chunk
    if type(frames) is not int or not made <= frames <= config.max_frames or (frames - made) % per_chunk:
        near = f"{made + per_chunk} or {made + 2 * per_chunk}"
        raise ValueError(f"the session has {made} frames and goes on by {per_chunk}: ask for {near}, not {frames!r}")
    return (frames - made) // per_chunk


def _word(value: object) -> str:
    """An option's value as the command line takes it: a name such as `-film.mp4` would be read as an option."""
    return f"./{value}" if str(value).startswith("-") else str(value)


def asked(args: argparse.Namespace) -> dict:
    """The settings that are given; the others are the model's or the session's own."""
    names = ("actions", "prompt", "negative_prompt", "seed", "steps", "guidance", "preset")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def changed(session: infworld.Session, args: argparse.Namespace, config: ModelConfig) -> infworld.Session:
    """The session with the settings that are given, for the frames to come."""
    settings = asked(args)
    if "actions" in settings:
        session = session.with_actions(settings.pop("actions"))
    if "seed" in settings:
        session = session.with_seed(settings.pop("seed"))
    if "preset" in settings:
        settings = {"steps": FilmSettings.for_model(config, preset=settings["preset"]).steps, **settings}
    return session.replace_settings(**settings)


def film(plan: FilmPlan, world: infworld.World, loading: float, stop: StopSignals) -> int:
    """Films and reports; returns the exit code. loading: the seconds it took to load the model.

    What there is of a film that could not be finished is kept and said, before the error is passed on.
    """
    began, team = time.monotonic(), world.team
    if note := world.config.untrained_note(plan.chunk_frames):
        print(f"note: {note}")
    if world.plan != FASTEST:
        print(f"there is too little GPU memory for all at once: {world.plan}")
    with stop.deferred():
        mp4 = JoinedMp4Writer(plan.out, world.config.validation_data.fps)
        writer = FilmWriter(mp4, plan.session_path, plan.next_command, plan.keeps_session)
        if team:
            team.if_lost(lambda: "; ".join(writer.rescue()))
        try:
            session = make(plan, world, writer, stop)
            writer.finish()
        except BaseException as error:
            print(*writer.rescue(), sep="\n")
            if isinstance(error, KeyboardInterrupt):
                return stop_code(error)
            if team and isinstance(error, NotEnoughMemory):  # which all ranks know, and end without another error
                print(f"error: {error}", file=sys.stderr)
                return FAILED
            raise
    remove_leftovers(plan.out, ".mp4")
    remove_leftovers(plan.session_path)
    if not plan.keeps_session:
        plan.session_path.unlink(missing_ok=True)
    print(f"{describe(mp4)}, seed {session.settings.seed}")
    if plan.keeps_session:
        print(f"go on with: {plan.next_command(plan.session_path, session.num_frames)}")
    devices = f"{team.size} x " if team else ""
    print(
        f"{world.config.name} on {devices}{device_name(world.device)}: loaded in {loading:.1f} s, "
        f"filmed in {time.monotonic() - began:.1f} s, peak memory {peak_memory(world.device)}{planned(world)}"
    )
    return 0


def make(plan: FilmPlan, world: infworld.World, writer: FilmWriter, stop: StopSignals) -> infworld.Session:
    """Makes and writes all chunks; returns the last session. A signal ends it after a step."""
    session = plan.begin(world)
    with closing(world.replay(session)) as shown:
        for chunk in shown:
            stop.check()
            writer.write(chunk, new=False)
    with Bar(session.settings.steps, plan.chunks_after(session)) as bar:

        def hear(progress: infworld.Progress) -> None:
            bar.show(progress)
            stop.check()

        with closing(world.extend(session, bar.chunks, hear, frames=plan.chunk_frames)) as made:
            for chunk in made:
                session = chunk.session
                writer.write(chunk)
    return session


def planned(world: infworld.World) -> str:
    """What of a GPU the plan meant to take at most, for comparison."""
    return (
        f" (GPU planned {world.memory_estimate().gpu(world.plan) / GB:.1f} GB)" if world.device.type == "cuda" else ""
    )
