"""Measures the engine on this machine against everything computed anew, both in one run.

    infworld benchmark --model infinite-world --budget 500 --out benchmark.json
    infworld benchmark --table benchmark.json --docs docs/benchmarks/h100.md

The sizes are a model's; the weights are random and made in memory, so no weight files are needed. *Naive* is the
computation whose cost spec section 11 gives: compressor and memory anew at every step, guidance as a batch of two,
flash attention, a float32 VAE one latent at a time, the whole history encoded again for each chunk. *Exact* is what
`World` does. The most important figures come first; what does not fit into the budget is named as left out, and after
every figure the JSON file is whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

from infworld.cli.benchmark.cards import small_cards
from infworld.cli.benchmark.choices import choices
from infworld.cli.benchmark.chunks import faster_presets, film_measured, film_sum, whole_chunk
from infworld.cli.benchmark.fusing import fused_kernels
from infworld.cli.benchmark.harness import Benchmark, names_among
from infworld.cli.benchmark.parts import ceilings, other_steps, profile, repeated_step, steady_step, vae_times
from infworld.cli.benchmark.quality import errors, vae_quality
from infworld.cli.benchmark.record import table

PARTS = {
    "ceilings": ceilings,
    "steady": steady_step,
    "vae": vae_times,
    "chunk": whole_chunk,
    "steps": other_steps,
    "film": film_sum,
    "presets": faster_presets,
    "errors": errors,
    "quality": vae_quality,
    "fused": fused_kernels,
    "choices": choices,
    "again": repeated_step,
    "measured-film": film_measured,
    "profile": profile,
    "small-cards": small_cards,
}
ON_REQUEST = ("fused", "measured-film", "profile", "small-cards")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="whose sizes: tiny (default), infinite-world, or a YAML file")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--size", type=size, help="height x width; default: 448x896, or the model's first bucket")
    parser.add_argument("--steps", type=int, help="sampler steps per chunk; default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--histories", type=integers, default=[1, 41, 121, 241], help="default: 1,41,121,241 latents")
    parser.add_argument("--chunks", type=int, default=13, help="of a film; default 13, which are 1041 frames")
    parser.add_argument("--budget", type=float, default=500, help="seconds that the run may take; default 500")
    usual = ",".join(part for part in PARTS if part not in ON_REQUEST)
    on_request = f"default: {usual}; on request: {','.join(ON_REQUEST)}"
    parser.add_argument("--parts", type=names_among(PARTS, "part"), default=usual, help=on_request)
    parser.add_argument("--out", default="benchmark.json", help="the JSON file; default benchmark.json")
    parser.add_argument("--table", metavar="JSON", help="measure nothing: print the table of such a file")
    parser.add_argument("--docs", type=Path, metavar="MARKDOWN", help="with --table: write it to this page")
    args = parser.parse_args(arguments)
    args.command = arguments
    return args


def size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def integers(text: str) -> list[int]:
    return [int(item) for item in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    if args.table:
        text = table(json.loads(Path(args.table).read_text(encoding="utf-8")))
        args.docs.write_text(text, encoding="utf-8") if args.docs else print(text)
        return 0
    bench = Benchmark(args)
    for part in args.parts:
        try:
            PARTS[part](bench)
        except Exception as error:  # such as too little memory; what comes after may still be measured
            traceback.print_exc()
            bench.record.leave_out(part, f"{type(error).__name__}: {error}".splitlines()[0])
    print(table(bench.record.results))
    return 0
