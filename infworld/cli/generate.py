"""Films a walk from the command line: a picture and actions in, an mp4 out.

infworld generate --image PICTURE --actions "forward 80, right 80" --frames 161 --out film.mp4

On a host with N GPUs, `torchrun --nproc-per-node N -m infworld generate ...` makes one film on all of them, and with
`--jobs FILE` many films, each on one. What is finished is kept, however the program ends (`film_writer`).
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext, suppress

import infworld
from infworld import parallel
from infworld.cli.cluster import generate_on_cluster
from infworld.cli.console import StopSignals, exit_code
from infworld.cli.film import LORA_OPTION, FilmPlan, film
from infworld.cli.jobs import WRONG, generate_all
from infworld.config import ModelConfig
from infworld.devices import limit_memory, pick_device
from infworld.memory_plan import NotEnoughMemory
from infworld.models import prepare, with_loras
from infworld.presets import PRESETS


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    program = generate if args.jobs is None else generate_all if args.cluster is None else generate_on_cluster
    with StopSignals() as stop:
        stopped = "stopped before the first frame"
        return exit_code(lambda: program(args, stop), stopped, quiet=parallel.rank() != 0, expected=WRONG)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Film a walk from one picture and a list of actions.",
        epilog="While a film is made, its session is kept beside it after every chunk (NAME.session.safetensors, or "
        "--session). However the program is stopped, at most the chunk in the making is lost: --resume goes on from "
        "that file. Without --session it is removed when the film is finished.",
    )
    begin = parser.add_argument_group("what to begin with (one of these)").add_mutually_exclusive_group(required=True)
    begin.add_argument("--image", metavar="FILE", help="a picture")
    begin.add_argument("--resume", metavar="SESSION", help="a saved session, which the film goes on from")
    begin.add_argument(
        "--jobs",
        metavar="FILE",
        help="many films: a JSON list, or one line each, of objects with the options of one film, such as "
        '{"image": "a.png", "out": "a.mp4"}; options left out are taken from the command line. Films that are there '
        "already with all their frames are not made again",
    )
    film = parser.add_argument_group("the film")
    film.add_argument("--out", metavar="FILE", help="the .mp4 to write; required except with --jobs")
    film.add_argument("--session", metavar="FILE", help="keep the session (.safetensors), to go on from it later")
    film.add_argument(
        "--actions",
        metavar="SCRIPT",
        help="what to do: text such as 'forward 80, right 40', or a JSON file; by default nothing",
    )
    film.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="length of the whole film: the picture and whole chunks, 81, 161, 241, ...; default: two chunks, 161",
    )
    film.add_argument(
        "--chunk-frames",
        type=int,
        metavar="N",
        help="new frames per chunk: the model's own 80 (default) or fewer, in steps of 4. Short ones are there sooner "
        "but drift sooner too, unless the model was trained on them",
    )
    film.add_argument("--prompt", metavar="TEXT", help="what the world looks like")
    film.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid, for models with guidance")
    film.add_argument("--seed", type=int, metavar="N", help="another seed makes another film; default: 0")
    film.add_argument(
        "--preset",
        choices=PRESETS,
        help="exact, or faster and less exact (docs/performance.md); default: the model's own",
    )
    film.add_argument("--steps", type=int, metavar="N", help="sampler steps per chunk; default: the preset's")
    film.add_argument(
        "--guidance", type=float, metavar="X", help="how closely to follow the prompt; default: the model's own"
    )
    machine = parser.add_argument_group("model and machine")
    machine.add_argument(
        "--model",
        metavar="NAME",
        help="infinite-world, tiny, or the path of a YAML file; missing weights are downloaded. Default: the resumed "
        "session's model, else the variable INFWORLD_MODEL, else infinite-world if its weights are here and a GPU that "
        "it fits on, else tiny",
    )
    machine.add_argument("--lora", **LORA_OPTION)
    machine.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    machine.add_argument(
        "--memory-gb",
        type=float,
        metavar="X",
        help="use at most so many GB (10^9 bytes) of the GPU's memory; default: all that is free",
    )
    machine.add_argument(
        "--cluster",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="make the films of --jobs with Ray, one on each GPU: of this host, or of the cluster at an address (auto: "
        "the one that this host is in)",
    )
    machine.add_argument("--workers", type=int, metavar="N", help="with --cluster: films at a time; default: the GPUs")
    args = parser.parse_args(arguments)
    if not args.out and args.jobs is None:
        parser.error("the following arguments are required: --out")
    if args.cluster is not None and args.jobs is None:
        parser.error("--cluster makes the films of --jobs")
    if args.workers is not None and (args.cluster is None or args.workers < 1):
        parser.error("--workers is a number of films at a time, with --cluster")
    return args


def generate(args: argparse.Namespace, stop: StopSignals) -> int:
    """Makes the film that `args` ask for; returns the exit code. What cannot work fails before the model is loaded."""
    plan = FilmPlan.of(args)
    device = parallel.device_of_rank(args.device)
    with plan.claimed() if parallel.rank() == 0 else nullcontext(), parallel.join_team(pick_device(device)) as team:

        def prepared() -> ModelConfig:
            return with_loras(prepare(plan.model), args.lora)

        config = prepared() if team is None else team.broadcast_from_rank0(prepared)
        began = time.monotonic()
        limit_memory(pick_device(device), args.memory_gb)
        world = infworld.load(config, device, team=team)
        loading = time.monotonic() - began
        return film(plan, world, loading, stop) if team is None or team.is_rank0 else follow(plan, world)


def follow(plan: FilmPlan, world: infworld.World) -> int:
    """What the other processes of a team do: the same work, without showing or keeping anything."""
    began = time.time()
    world.team.if_lost(lambda: how_to_go_on(plan, began))
    with suppress(parallel.Abandoned, NotEnoughMemory):
        session = plan.begin(world)
        for _ in world.replay(session):
            pass
        for _ in world.extend(session, plan.chunks_after(session), frames=plan.chunk_frames):
            pass
    return 0


def how_to_go_on(plan: FilmPlan, began: float) -> str:
    """After rank 0 was lost: how to go on, if a session was saved since `began` (of `time.time`)."""
    path = plan.session_path
    if path.exists() and path.stat().st_mtime >= began:
        return f"the film so far is saved; go on with: {plan.next_command(path, 0)}"
    return "no new chunk was finished"
