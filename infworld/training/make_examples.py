"""Writes the example scenes that are toy worlds: start pictures that training never drew, with actions that test the
memory. Where the other examples are from: examples/SOURCES.md.

infworld train examples --out examples
infworld train examples --films docs/films.webp     # what the tiny model makes of four of all
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import infworld
from infworld.actions import ActionScript
from infworld.evaluation.cases import read_suite
from infworld.training.render import render
from infworld.training.worlds import EVAL_SEEDS, captions, make_worlds, spawn

SIZE = 384, 512  # larger than the tiny model's pictures, as pictures that people bring are

# File name, index into EVAL_SEEDS, actions.
SCENES = (
    ("1-island-look-and-return", 100, "right 80, left 80"),
    ("2-autumn-walk-and-return", 139, "forward 80, back 80"),
    ("3-dusk-full-circle", 132, "right 320"),
    ("4-neon-there-and-back", 133, "left 80, forward 80, back 80, right 80"),
    ("5-sunset-looking-both-ways", 105, "left 80, right 160, left 80"),
    ("6-snow-square", 138, "forward 80, right 80, forward 80, right 80, forward 80, right 80, forward 80, right 80"),
    (
        "7-candy-a-thousand-frames",
        120,
        "right 80, left 80, forward 80, back 80, left 80, right 80, forward+left 80, back 80, right 320, wait 80",
    ),
)

SHOWN = ("8-abbey-look-and-return", "12-evening-towers-both-ways", "1-island-look-and-return", "3-dusk-full-circle")
SHOWN_FRAMES, SHOWN_SIZE, SHOWN_FPS = 81, (384, 288), 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples"))
    parser.add_argument("--films", type=Path, help="write no scenes: a WebP of films of those that are there")
    args = parser.parse_args()
    if args.films:
        return write_films(args.films, args.out)
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    worlds = make_worlds([EVAL_SEEDS[index] for _, index, _ in SCENES])
    pictures = render(worlds, spawn(worlds)[:, None], *SIZE)[:, 0]
    for (name, _, text), picture, caption in zip(SCENES, pictures, captions(worlds), strict=True):
        Image.fromarray(picture.numpy()).save(out / f"{name}.png", optimize=True)
        (out / f"{name}.json").write_text(ActionScript.parse(text).to_json(), encoding="utf-8")
        (out / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


def write_films(path: Path, scenes: Path) -> None:
    """The films of some scenes in a square, each from its beginning to its end, in the same time."""
    world, films = infworld.load("tiny"), []
    cases = {case.name: case for case in read_suite(scenes, SHOWN_FPS).cases}
    for case in (cases[name] for name in SHOWN):
        length = 1 + len(case.actions)
        chunks = list(world.rollout(case.picture, case.actions, case.prompt, length))
        frames = np.concatenate([chunk.frames for chunk in chunks])
        shown = np.linspace(0, length - 1, SHOWN_FRAMES).round().astype(int)
        films.append([Image.fromarray(frame).resize(SHOWN_SIZE, Image.Resampling.BICUBIC) for frame in frames[shown]])
    width, height = SHOWN_SIZE
    places = [(x, y) for y in (0, height) for x in (0, width)]
    pictures = [Image.new("RGB", (2 * width, 2 * height)) for _ in range(SHOWN_FRAMES)]
    for picture, together in zip(pictures, zip(*films, strict=True), strict=True):
        for place, frame in zip(places, together, strict=True):
            picture.paste(frame, place)
    first, *others = pictures
    first.save(path, save_all=True, append_images=others, duration=1000 // SHOWN_FPS, loop=0, quality=60, method=6)


if __name__ == "__main__":
    main()
