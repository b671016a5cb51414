"""Writes the cases that `infworld evaluate` comes with: pictures of worlds that training never drew, and walks of 16
chunks as in the paper's tests: stretches of one action for 80 frames and multiples, with many returns.

infworld train cases --out infworld/cases
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from infworld.actions import ActionScript
from infworld.training.render import render
from infworld.training.worlds import EVAL_SEEDS, captions, make_worlds, spawn

SIZE = 384, 512  # larger than the tiny model's pictures, as pictures that people bring are
FRAMES = 16 * 80

# Name, index into EVAL_SEEDS, actions. The first two return within 4 chunks: a quick evaluation takes only them.
CASES = (
    (
        "looking-about",
        148,
        "left 80, right 160, left 80, forward 160, left 80, right 160, left 80, back 160, right 160, left 160",
    ),
    ("circles", 142, "right 320, wait 80, left 320, forward 80, right 160, left 160, back 80, wait 80"),
    (
        "two-loops",
        140,
        "right 80, forward 80, right 160, left 160, back 80, left 80, "
        "left 80, forward 80, left 160, right 160, back 80, right 80",
    ),
    (
        "far-and-undone",
        141,
        "right 80, forward 80, right 80, forward 80, right 80, forward 80, "
        "back 80, left 80, back 80, left 80, back 80, left 80, right 320",
    ),
    ("square-twice", 143, ", ".join(["forward 80, right 80"] * 8)),
    (
        "long-turns",
        144,
        "forward 80, right 80, forward 80, right 80, left 240, forward 160, right 160, forward 160, right 240",
    ),
    (
        "street",
        145,
        "right 80, forward 80, left 160, forward 160, left 160, right 240, "
        "up 20, down 40, up 20, right 80, left 80, forward 160",
    ),
    (
        "sidesteps",
        146,
        "strafe left 80, right 160, strafe left 80, left 160, strafe right 160, forward 80, right 80, left 80, "
        "back 80, right 160, left 160",
    ),
    (
        "diagonals",
        147,
        "forward+strafe left 80, left 80, right 80, back+strafe right 80, right 240, left 240, "
        "forward 160, back 160, wait 160",
    ),
    (
        "waiting",
        149,
        "wait 80, right 80, wait 80, left 80, wait 80, forward 80, wait 80, back 80, wait 80, "
        "left 160, wait 80, right 160, wait 160",
    ),
    ("there-and-back", 150, "forward 240, right 160, forward 240, right 160, up 20, down 40, up 20, left 320, wait 80"),
    ("arcs", 151, "forward+right 320, back+left 320, forward+left 320, back+right 320"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("infworld/cases"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    worlds = make_worlds([EVAL_SEEDS[index] for _, index, _ in CASES])
    pictures = render(worlds, spawn(worlds)[:, None], *SIZE)[:, 0]
    cases = []
    for (name, _, text), picture, caption in zip(CASES, pictures, captions(worlds), strict=True):
        if len(ActionScript.parse(text)) != FRAMES:
            raise ValueError(f"{name} has {len(ActionScript.parse(text))} frames of actions, not {FRAMES}")
        Image.fromarray(picture.numpy()).save(out / f"{name}.webp", quality=90, method=6)
        cases.append({"name": name, "picture": f"{name}.webp", "actions": text, "prompt": caption})
    (out / "cases.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
