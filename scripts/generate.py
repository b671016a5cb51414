"""Films a walk from the command line: a picture and actions in, an mp4 out. Ctrl-C keeps what has been made.

python scripts/generate.py --image PICTURE --actions "forward 80, right 80" --frames 161 --out film.mp4
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import infworld
from infworld.actions import ActionScript
from infworld.config import load_config
from infworld.models import default_model, device_name, peak_memory, prepare
from infworld.presets import EXACT, PRESETS, find_preset
from infworld.video import Mp4Writer, check_output, load_image

INTERRUPTED = 130  # the exit code that shells give to Ctrl-C


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        return generate(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped before the first frame", file=sys.stderr)
        return INTERRUPTED


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Film a walk from one picture and a list of actions.")
    begin = parser.add_mutually_exclusive_group(required=True)
    begin.add_argument("--image", help="the picture to begin with")
    begin.add_argument("--resume", metavar="SESSION", help="a saved session to go on from")
    parser.add_argument("--actions", help="JSON file, or text such as 'forward 80, right 40'; default: no action")
    parser.add_argument("--frames", type=int, default=161, help="length of the whole film: 81, 161 (default), 241, ...")
    parser.add_argument("--out", required=True, help="the mp4 to write")
    parser.add_argument("--session", metavar="FILE", help="save the session here (.safetensors), to resume later")
    parser.add_argument(
        "--model",
        help="infinite-world, tiny, or the path of a YAML file; missing weights are downloaded. Default: the resumed "
        "session's, else INFWORLD_MODEL, else infinite-world if its weights and a GPU it fits on are here, else tiny",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--compile", action="store_true", help="for long films on a GPU: faster, after a slow start")
    parser.add_argument("--prompt", help="what the world looks like")
    parser.add_argument("--negative-prompt", help="what to avoid, where the model uses guidance")
    parser.add_argument("--seed", type=int, help="another number, another film (default 0)")
    parser.add_argument(
        "--preset", choices=PRESETS, help="exact (default), or faster and less exact; docs/performance.md says how much"
    )
    parser.add_argument("--steps", type=int, help="sampler steps per chunk; default: the preset's")
    parser.add_argument("--guidance", type=float, help="how closely to follow the prompt; default: the model's own")
    return parser.parse_args(arguments)


def generate(args: argparse.Namespace) -> int:
    """Makes the film that `args` ask for; returns the exit code. What cannot work fails before the model is loaded."""
    out = check_output(args.out)
    session_path = check_output(args.session or out.with_suffix(".session.safetensors"), ".safetensors")
    script = ActionScript.of(args.actions)
    picture = None if args.resume else load_image(args.image)
    session = resumed(args) if args.resume else None
    name = args.model or (session.model if session else default_model(args.device))
    chunks = load_config(name).chunks_for(args.frames)
    if session is not None and session.num_frames >= args.frames:
        raise ValueError(f"the session has {session.num_frames} frames already: ask for more with --frames")

    config = prepare(name)
    began = time.monotonic()
    world = infworld.load(config, args.device, compile=args.compile)
    loaded = time.monotonic()
    if session is None:
        begin = {"negative_prompt": args.negative_prompt, "steps": args.steps, "guidance": args.guidance}
        begin["preset"] = args.preset or EXACT.name
        session = world.start(picture, script, args.prompt or "", seed=args.seed or 0, **begin)
    interrupted = False
    with Mp4Writer(out, world.config.validation_data.fps) as film, Behind(film) as writer:
        try:
            for chunk in world.replay(session):
                writer.write(chunk.frames)
            with Bar(session.steps, chunks - len(session.chunk_latents)) as bar:
                for chunk in world.extend(session, bar.chunks, bar.show):
                    session = chunk.session
                    writer.write(chunk.frames)
        except KeyboardInterrupt:
            interrupted = True
    report(film, session, session_path if args.session or interrupted else None, interrupted)
    print(
        f"{config.name} on {device_name(world.device)}: loaded in {loaded - began:.1f} s, "
        f"filmed in {time.monotonic() - loaded:.1f} s, peak memory {peak_memory(world.device)}"
    )
    return INTERRUPTED if interrupted else 0


def resumed(args: argparse.Namespace) -> infworld.Session:
    """The saved session, with what the command line changes for the frames to come."""
    session = infworld.Session.load(args.resume)
    if args.actions is not None:
        session = session.with_actions(args.actions)
    if args.prompt is not None or args.negative_prompt is not None:
        session = session.with_prompt(session.prompt if args.prompt is None else args.prompt, args.negative_prompt)
    if args.seed is not None:
        session = session.with_seed(args.seed)
    steps = args.steps
    if args.preset is not None and steps is None:
        steps = find_preset(args.preset).steps_of(load_config(args.model or session.model).val_scheduler_cfg)
    changes = {"steps": steps, "guidance": args.guidance, "preset": args.preset}
    return dataclasses.replace(session, **{name: value for name, value in changes.items() if value is not None})


class Behind:
    """Writes a film's frames in another thread, so that the next chunk does not wait for them.

    What goes wrong there is raised by the next `write`, or at the end.
    """

    def __init__(self, film: Mp4Writer):
        self._film = film
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind, *exception) -> None:
        self._thread.shutdown()
        if kind is None:
            self._finish()

    def write(self, frames: np.ndarray) -> None:
        self._finish()
        self._writing = self._thread.submit(self._film.write, frames)

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
        print(f"{stopped}{film.path} has {film.frames} frames ({film.frames / film.fps:.1f} s), seed {session.seed}")
    if session_path is not None:
        session.save(session_path)
        print(f"go on with: --resume {session_path} --frames {session.num_frames + 160}")


if __name__ == "__main__":
    sys.exit(main())
