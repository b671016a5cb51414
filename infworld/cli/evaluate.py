"""Measures a model on any pictures, without a true film: memory, control, stability, motion.

    infworld evaluate --model tiny --out report/
    infworld evaluate --model tiny --cases my-cases/ --films films/ --out report/
    infworld evaluate --quick --out report/

Writes report.html (one file with plots and film strips), report.json, films.csv and figures.csv. Interrupted, the same
command goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from tqdm import tqdm

import infworld
from infworld.cli.console import exit_code
from infworld.models import default_model, prepare
from infworld.presets import PRESETS
from infworld.settings import FilmSettings
from infworld.world import World


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: evaluate(args), "stopped; the same command goes on from here")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="infworld evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="infinite-world, tiny, or the path of a YAML file; default: as for generate")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--cases", type=Path, help="folder of cases (docs/measuring.md); default: the 12 that come along")
    add("--out", type=Path, required=True, help="folder of the report, and of what an interrupted run has done")
    add("--films", type=Path, metavar="DIR", help="also write the walks as mp4, under the names the suite expects")
    add("--quick", action="store_true", help="2 cases of 4 chunks, 8 actions: a look in place of a measurement")
    add("--frames", type=int, metavar="N", help="longest walk; default 1041, the paper's trajectories have 1281")
    add("--only", metavar="N", type=int, help="only the first N cases")
    add("--whole-memory-only", action="store_true", help="do not film again with memory cut to the last frame")
    add("--preset", choices=PRESETS, help="of the sampler; default: the model's own")
    add("--steps", type=int, help="sampler steps per chunk; default: the preset's")
    add("--guidance", type=float, help="default: the model's own")
    add("--seed", type=int, default=0, help="of the first case; the others count on from it")
    return parser.parse_args(arguments)


def evaluate(args: argparse.Namespace) -> int:
    """Films, measures and reports; returns the exit code. What cannot work fails before the model is loaded."""
    try:
        from infworld.evaluation.cases import SHIPPED, read_suite
        from infworld.evaluation.report import text_table, write_report
        from infworld.evaluation.run import Evaluation, FilmFolder, digest, run
        from infworld.evaluation.takes import FULL, QUICK, WHOLE, plan
        from infworld.metrics.networks import find_networks
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install infworld[metrics]") from error

    config = prepare(args.model or default_model(args.device))
    suite = read_suite(args.cases or SHIPPED, config.validation_data.fps)
    scope = QUICK if args.quick else FULL
    changes = {
        "cases": args.only,
        "walk_chunks": args.frames and config.chunks_for(args.frames),
        "memories": (WHOLE,) if args.whole_memory_only else None,
    }
    scope = dataclasses.replace(scope, **{name: value for name, value in changes.items() if value is not None})
    takes = plan(suite.cases, scope, config.chunk_frames, args.seed)
    choices = {"preset": args.preset, "steps": args.steps, "guidance": args.guidance}
    world = infworld.load(config, args.device)
    networks = find_networks(world.device)
    settings = {**settings_of(world, choices), "seed": args.seed, "cases": digest(suite), "networks": str(networks)}
    evaluation = Evaluation(args.out, settings, networks)
    films = FilmFolder(args.films, suite) if args.films else None
    measured = []
    kept = [take for take in takes if evaluation.done(take) and not (films and films.lack(take))]
    total, initial = (sum(take.chunks for take in some) for some in (takes, kept))
    with tqdm(total=total, initial=initial, unit="chunk", dynamic_ncols=True) as bar:
        for take, found in run(evaluation, world, takes, choices, films):
            measured.append(found)
            bar.set_description_str(take.name, refresh=False)
            bar.update(take.chunks if take not in kept else 0)  # which the time left is reckoned from
    path = write_report(evaluation, measured)
    print(f"{text_table(measured)}\n\n{len(measured)} films measured; the report is {path}")
    for name, why in networks.missing.items():
        print(f"{name} is left out: {why}")
    return 0


def settings_of(world: World, choices: dict) -> dict:
    """What a model's films depend on, in words."""
    chosen = FilmSettings.for_model(world.config, **choices)
    return {
        "model": world.config.name,
        "weights": world.config.path(world.config.checkpoint_path).name,
        "dtype": str(world.transformer.dtype).removeprefix("torch."),
        "device": world.device.type,
        "preset": chosen.preset,
        "steps": chosen.steps,
        "guidance": chosen.guidance,
    }


if __name__ == "__main__":
    sys.exit(main())
