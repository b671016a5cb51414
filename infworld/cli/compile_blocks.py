"""Compiles a model's blocks ahead of time for the card at hand, which needs no weights. `load` then finds them.

infworld compile-blocks --model infinite-world
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import torch

from infworld import hub, packages
from infworld.cli.console import exit_code
from infworld.config import load_config
from infworld.devices import device_name, pick_device, pick_dtype
from infworld.transfer import size_text


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return exit_code(lambda: compile_blocks(args), "stopped; there is no package yet")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compile a model's blocks ahead of time, for this kind of card.")
    parser.add_argument("--model", default="infinite-world", help="infinite-world (default), tiny, or a YAML file")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--out", metavar="DIR", help=f"where to put its folder; default: {hub.weights_folder()}")
    return parser.parse_args(arguments)


def compile_blocks(args: argparse.Namespace) -> None:
    config, device = load_config(args.model), pick_device(args.device)
    dtype = pick_dtype(device, getattr(torch, config.amp_dtype))
    place = Path(args.out).expanduser() if args.out else hub.weights_folder()
    folder = place / packages.folder_name(config.name, device)
    began = time.monotonic()
    deviation = packages.make(config, device, dtype, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*.pt2"))
    print(
        f"{folder}: {size_text(size)} for {device_name(device)} ({dtype}), made in {time.monotonic() - began:.0f} s; "
        f"deviates by {deviation:.1e} of the largest value from blocks that are not compiled"
    )
