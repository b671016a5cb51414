"""Writes the example scenes: start pictures of worlds that training never drew, with actions that test the memory.

python -m training.make_examples --out examples
"""

import argparse
from pathlib import Path

from PIL import Image

from infworld.actions import ActionScript
from training.render import render
from training.worlds import EVAL_SEEDS, captions, make_worlds, spawn

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("examples"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    worlds = make_worlds([EVAL_SEEDS[index] for _, index, _ in SCENES])
    pictures = render(worlds, spawn(worlds)[:, None], *SIZE)[:, 0]
    for (name, _, text), picture, caption in zip(SCENES, pictures, captions(worlds), strict=True):
        Image.fromarray(picture.numpy()).save(out / f"{name}.png", optimize=True)
        (out / f"{name}.json").write_text(ActionScript.parse(text).to_json(), encoding="utf-8")
        (out / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
