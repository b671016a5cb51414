"""A page on which people compare films of different models or settings, two at a time, blind.

    infworld arena FILMS

FILMS has a folder for each model or setting with films of the same names in them, as `infworld evaluate --films
FILMS/NAME` writes them. The votes are kept in FILMS/votes.sqlite, or where --votes says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from infworld.cli.console import exit_code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="infworld arena", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("films", type=Path, metavar="FILMS", help="folder with a folder of films for each model or setting")
    add(
        "--votes",
        metavar="FILE",
        help="where the votes are: a file, or hf://datasets/USER/NAME for a dataset of the Hub; default: "
        "INFWORLD_VOTES, else a Space's storage, else FILMS/votes.sqlite",
    )
    add("--export", type=Path, metavar="FILE", help="write the votes as .csv or .json and the table, and end")
    add("--host", help="address to listen on: 0.0.0.0 for all (default: only this machine)")
    add("--port", type=int, help="default: the first free one from 7860 on")
    args = parser.parse_args(arguments)
    return exit_code(lambda: export(args) if args.export else serve(args), "stopped")


def serve(args: argparse.Namespace) -> int:
    """The page, until Ctrl-C."""
    from infworld.app.arena_page import launch, open_hall

    with open_hall(args.films, args.votes) as hall:
        print(f"{len(hall.matches.pairs())} pairs; votes go to {hall.votes.path}")
        launch(hall, server_name=args.host, server_port=args.port)
    return 0


def export(args: argparse.Namespace) -> int:
    """Writes the votes and prints the tables."""
    from infworld.arena.hub_votes import DATASET, open_votes, place
    from infworld.arena.ranking import standings
    from infworld.arena.votes import QUESTIONS

    where = place(args.films, args.votes)
    if not where.startswith(DATASET) and not Path(where).is_file():
        raise FileNotFoundError(f"no votes at {where}")
    if args.export.suffix not in (".csv", ".json"):
        raise ValueError(f"the votes are written as .csv or .json, not as {args.export.name!r}")
    with open_votes(args.films, where) as votes:
        cast = votes.all()
        args.export.write_text(votes.as_json() if args.export.suffix == ".json" else votes.as_csv(), encoding="utf-8")
    for question in QUESTIONS:
        print(question)
        for line in standings([vote for vote in cast if vote.question == question]):
            print(f"  {line.rating:5.0f} [{line.low:.0f}, {line.high:.0f}]  Elo {line.elo:.0f}  {line.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
