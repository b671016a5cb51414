"""Downloads the released weights, or what is still missing of them. Ctrl-C and run it again: it goes on.

infworld download
infworld download --lora USER/NAME
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from infworld import hub
from infworld.cli.console import exit_code
from infworld.config import ModelConfig, load_config
from infworld.lora import Lora
from infworld.transfer import size_text


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return exit_code(lambda: download(args), "stopped; run the same again to go on")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Download the released weights from the Hub.")
    parser.add_argument(
        "--model", default="infinite-world", help="infinite-world (default), or the path of a YAML file"
    )
    parser.add_argument("--to", metavar="DIR", help=f"folder to download to; default: {hub.weights_folder()}")
    parser.add_argument("--revision", help=f"commit, tag or branch of {hub.REPO}; default: main, kept once begun")
    parser.add_argument("--lora", metavar="USER/NAME", help="only download this LoRA from the Hub")
    parser.add_argument("--dry-run", action="store_true", help="only list the files that would be downloaded")
    return parser.parse_args(arguments)


def download(args: argparse.Namespace) -> None:
    if args.lora:
        fetch_lora(args.lora)
        return
    config = load_config(args.model)
    if args.dry_run:
        show(hub.plan(config, revision=args.revision, to=args.to))
    else:
        fetch(config, args)


def show(todo: hub.DownloadPlan) -> None:
    """Lists what would be downloaded, and from where."""
    for damage in todo.damages:
        print(damage)
    for file in todo.files:
        rest = f", {size_text(file.missing)} still to come" if file.missing < file.size else ""
        print(f"{size_text(file.size):>9}  {file.target}  from {file.repo}/{file.path} at {file.commit[:12]}{rest}")
    total = sum(file.missing for file in todo.files)
    print(f"{len(todo.files)} files, {size_text(total)} to download" if todo.files else "everything is there")


def fetch_lora(repo: str) -> None:
    """Downloads a LoRA, with a bar; says where it is and how to use it."""
    with transfer_bar() as progress:
        path = hub.fetch_lora(repo, progress)
    lora = Lora.load(path)
    print(f"{path}: a LoRA for {lora.model or 'a model it does not name'}, {len(lora.layers)} layers")
    print(f"use it with: infworld serve --lora {path}")


@contextmanager
def transfer_bar() -> Iterator[Callable[[hub.Transfer], None]]:
    """A bar in the console, and what moves it."""
    with tqdm(total=1, bar_format="{percentage:3.0f}% |{bar:30}| {desc}", disable=None, leave=False) as bar:

        def progress(transfer: hub.Transfer) -> None:
            bar.total, bar.n = transfer.total, transfer.done
            bar.set_description_str(str(transfer))

        yield progress


def fetch(config: ModelConfig, args: argparse.Namespace) -> None:
    """Downloads and checks, with a bar; says where the files are and how to use them."""
    with transfer_bar() as progress:
        placed = hub.fetch(config, progress, revision=args.revision, to=args.to)
    print(f"{config.name} is complete, and its tensors fit:")
    text = placed.text_encoder_cfg
    for path in filter(
        None, (placed.checkpoint_path, placed.vae_cfg.vae_pth, text.checkpoint_path, text.tokenizer_path)
    ):
        print(f"  {path}")
    start = f"infworld serve --model {args.model}"
    if hub.find(config) is None:  # a folder of the user's choice: the app has to be told
        start = f"INFWORLD_CHECKPOINTS={Path(args.to).expanduser().absolute()} {start}"
    print(f"start it with: {start}")
