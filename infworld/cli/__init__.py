"""The command `infworld`: one door to the command-line programs, each a module with a `main` of its own."""

from __future__ import annotations

import importlib
import sys

# Command -> module, and what it does. A module is imported when its command is given: torch takes seconds.
COMMANDS = {
    "generate": ("infworld.cli.generate", "film a walk: a picture and actions in, an mp4 out"),
    "serve": ("infworld.app.page", "the page in the browser"),
    "download": ("infworld.cli.download", "download the released weights"),
    "convert": ("infworld.cli.convert", "write released weights in a form that loads faster"),
    "upload": ("infworld.cli.upload", "upload this project to the Hub, as a model or a Space"),
    "benchmark": ("infworld.cli.benchmark.benchmark", "measure the engine on this machine"),
    "check-parity": ("infworld.cli.check_parity", "compare every stage with tensors of the reference computation"),
    "compile-blocks": ("infworld.cli.compile_blocks", "compile the transformer's blocks ahead of time"),
    "random-checkpoint": ("infworld.cli.random_checkpoint", "write random weights of the released sizes"),
    "train-vae": ("infworld.training.train_vae", "train a VAE on procedural worlds"),
    "train-world": ("infworld.training.train_world", "train a world model on procedural worlds"),
    "evaluate": ("infworld.cli.evaluate", "measure a model on any pictures: memory, control, stability, motion"),
    "evaluate-worlds": ("infworld.training.evaluate", "measure a model against procedural worlds"),
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the named command with the arguments after it; returns its exit code."""
    command, *rest = arguments or sys.argv[1:] or ["--help"]
    if command not in COMMANDS:
        asked = command in ("-h", "--help")
        print(_usage() if asked else f"unknown command {command!r}\n\n{_usage()}", file=None if asked else sys.stderr)
        return 0 if asked else 2
    sys.argv = [f"infworld {command}", *rest]  # what argparse calls the program by
    return importlib.import_module(COMMANDS[command][0]).main() or 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "usage: infworld COMMAND ...  (infworld COMMAND --help for its options)\n\n" + "\n".join(lines)
