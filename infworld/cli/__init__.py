"""The command `infworld`: one door to the command-line programs, each a module with a `main` of its own."""

from __future__ import annotations

import importlib
import sys

import infworld
from infworld.cli.console import unfailing_output

# Command -> module, and what it does. A module is imported when its command is given: torch takes seconds.
COMMANDS = {
    "generate": ("infworld.cli.generate", "make a film: a picture and actions in, an mp4 out"),
    "serve": ("infworld.app.server", "open the page in a browser"),
    "download": ("infworld.cli.download", "download the released weights, or what is missing of them"),
    "convert": ("infworld.cli.convert", "rewrite the released weights so that they load faster"),
    "upload": ("infworld.cli.upload", "upload this project to the Hub as a model or a Space"),
    "benchmark": ("infworld.cli.benchmark.run", "measure the engine on this machine"),
    "benchmark team": ("infworld.cli.benchmark.team", "measure several devices against one (under torchrun)"),
    "benchmark finetune": ("infworld.cli.benchmark.finetune", "measure time and memory of fine-tuning on this machine"),
    "play-benchmark": ("infworld.cli.benchmark.play", "measure how well the page plays, in a real browser"),
    "check-parity": ("infworld.cli.check_parity", "compare every stage with tensors of the reference computation"),
    "random-checkpoint": ("infworld.cli.random_checkpoint", "write random weights in the released files' form"),
    "prepare-videos": ("infworld.cli.prepare_videos", "make training data of your own films"),
    "finetune": ("infworld.cli.finetune", "fine-tune a model on prepared videos, or train a LoRA"),
    "distill": ("infworld.cli.distill", "teach a model to film with a few steps a chunk, without guidance"),
    "train vae": ("infworld.training.train_vae", "train a VAE on procedural worlds"),
    "train world": ("infworld.training.train_world", "train a world model on procedural worlds"),
    "train labels": ("infworld.training.labels", "turn camera poses into actions"),
    "train check-gradients": ("infworld.training.check_gradients", "compare a run's gradients with float32 ones"),
    "train examples": ("infworld.training.make_examples", "draw the example pictures"),
    "train cases": ("infworld.training.make_cases", "draw the pictures of the cases for evaluate"),
    "evaluate": ("infworld.cli.evaluate", "measure a model on any pictures: memory, control, stability, motion"),
    "evaluate-worlds": ("infworld.training.evaluate", "measure a model against procedural worlds"),
    "arena": ("infworld.cli.arena", "compare films of several models or settings, blind, and rank them"),
}
EXTRAS = {"app": "app", "training": "train"}  # subpackage -> the extra that brings what it imports


@unfailing_output()
def main(arguments: list[str] | None = None) -> int:
    """Runs the command at the beginning of the arguments (default: the process's) with the rest of them.

    Returns its exit code; 2 for an unknown command and for one whose requirements are not installed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(f"infworld {infworld.__version__}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    command = next((name for name in (" ".join(arguments[:2]), arguments[0]) if name in COMMANDS), None)
    if command is None:
        print(unknown(arguments[0]), file=sys.stderr)
        return 2
    # Under this name argparse and the programs themselves speak of the command.
    sys.argv = [f"infworld {command}", *arguments[len(command.split()) :]]
    module = COMMANDS[command][0]
    try:
        program = importlib.import_module(module)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(module.split(".")[1])
        if extra is None or (error.name or "").startswith("infworld"):
            raise
        print(f"infworld {command} needs {error.name}: pip install 'infworld[{extra}]', ", end="", file=sys.stderr)
        print(f"or pip install -e '.[{extra}]' in a clone", file=sys.stderr)
        return 2
    return program.main() or 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: infworld [--version] COMMAND [OPTION ...]", "", *lines, "", "infworld COMMAND --help"])


def unknown(word: str) -> str:
    """Says what is wrong with a command line that begins with this word."""
    inside = [name for name in COMMANDS if name.startswith(f"{word} ")]
    return (
        f"infworld {word}: choose one of: {', '.join(inside)}" if inside else f"unknown command {word!r}\n\n{usage()}"
    )
