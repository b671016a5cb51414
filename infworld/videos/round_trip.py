"""How many actions are found again: films of procedural worlds with known poses, through mp4 and `prepare-videos`.

    python -m infworld.videos.round_trip make films/a --kind textured --pack pack.zip --seed 13 --jitter 1
    infworld prepare-videos films --out data
    python -m infworld.videos.round_trip compare data films

`make` writes films/a.mp4 and what was done in films/a.npz. The walks keep clear of things and do what they are told, as
people do. --jitter 1 is a hand's: 0.3 degrees and 1.5 cm (a unit is 2.5 m) of slow sway, and a tremor of a seventh of
that.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from infworld.actions import UNCERTAIN
from infworld.training.labels import label_actions, poses_to_matrices
from infworld.training.pictures import Pictures, load_pictures
from infworld.training.render import render
from infworld.training.scenes import Scenes, draw_scenes
from infworld.training.stages import Stages, render_stages
from infworld.training.walks import MIXED, VIEW_ONLY, sample_actions
from infworld.training.worlds import EVAL_SEEDS, clearance
from infworld.video import FPS, Mp4Writer
from infworld.videos.dataset import Clip, open_data

MIXTURES = {"mixed": MIXED, "view": VIEW_ONLY, "walk": {"go_return": 0.6, "random": 0.4}}
TRIES = 500  # walks drawn until one keeps clear
CLEAR = 0.8  # units from everything
OBEYED = 0.985  # of the moves have to have happened
SWAY, TREMOR = (4.0, 1.0), (1.0, 0.15)  # frames of smoothing, and size
HAND = np.array([0.006, 0.006, *np.radians([0.3, 0.3])])  # units and radians of x, y, yaw, pitch


@dataclass
class Found:
    """The share of a clip's frames that is *uncertain*; of the others, of how many move and view are right."""

    clip: Clip
    uncertain: float
    right: float
    moves_right: float
    views_right: float


def draw_walk(
    kind: str, mixture: dict[str, float], seed: int, frames: int, pictures: Pictures | None
) -> tuple[Scenes, Tensor]:
    """The first walk of a seed that keeps clear, and its actions (2, frames). ValueError if there is none."""
    generator = torch.Generator().manual_seed(seed)
    for number in range(TRIES):
        move, view = sample_actions(mixture, 1, frames, generator)
        world = EVAL_SEEDS[1000 * seed + number]
        scenes = draw_scenes(kind, range(world, world + 1), move[:, :-1], view[:, :-1], pictures, generator)
        happened, _ = label_actions(poses_to_matrices(scenes.poses[0]).double())
        clear = isinstance(scenes.places, Stages) or clearance(scenes.places, scenes.poses[..., :2]).min() > CLEAR
        if clear and (happened == move[0, :-1]).float().mean() > OBEYED:
            return scenes, torch.cat([move, view])
    raise ValueError(f"no walk of seed {seed} keeps clear in {TRIES} tries: take another seed or fewer frames")


def shaken(poses: Tensor, amount: float, seed: int) -> Tensor:
    """Poses (1, T, 4) of `worlds` as a hand holds the camera; amount: times `HAND`."""
    random = np.random.default_rng(seed)
    noise = np.zeros(poses.shape[1:])
    for smooth, size in (SWAY, TREMOR):
        part = gaussian_filter1d(random.standard_normal(noise.shape), smooth, axis=0)
        noise += size * part / part.std(0)
    return poses + torch.from_numpy(amount * noise * HAND)[None].to(poses)


def write_film(path: Path, scenes: Scenes, actions: Tensor, size: tuple[int, int]) -> None:
    """Renders a walk at height and width `size` to `path`.mp4, and writes its poses and actions to `path`.npz."""
    poses = scenes.poses
    with Mp4Writer(path.with_suffix(".mp4")) as film:
        for first in range(0, poses.shape[1], FPS):
            some = poses[:, first : first + FPS]
            if isinstance(scenes.places, Stages):
                assert scenes.pictures  # which stages are made of
                pictures = render_stages(scenes.places, scenes.pictures.photos, some, *size, supersample=1)
            else:
                pictures = render(
                    scenes.places, some, *size, supersample=1, skins=scenes.skins, pictures=scenes.pictures
                )
            film.write(pictures[0].numpy())
    np.savez(path.with_suffix(".npz"), poses=poses[0].numpy(), move=actions[0].numpy(), view=actions[1].numpy())


def compare(clip: Clip, truth: Path) -> Found:
    """A clip's actions against those that were done."""
    with np.load(truth) as done:
        actions = np.stack([done["move"], done["view"]])
    first = round(clip.info.start * clip.info.fps)
    found = clip.actions[:, :-1].numpy()
    right = found == actions[:, first : first + found.shape[1]]
    certain = (found != UNCERTAIN).all(0)
    shares = (right.all(0)[certain].mean(), right[0][certain].mean(), right[1][certain].mean())
    return Found(clip, 1 - certain.mean(), *map(float, shares))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make")
    make.add_argument("path", type=Path)
    make.add_argument("--kind", choices=("toy", "textured", "pictures"), default="textured")
    make.add_argument("--mixture", choices=MIXTURES, default="mixed")
    make.add_argument("--pack", type=Path, help="of training.collect; toy worlds need none")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--frames", type=int, default=401)
    make.add_argument("--size", type=int, nargs=2, default=(240, 320), metavar=("HEIGHT", "WIDTH"))
    make.add_argument("--jitter", type=float, default=0.0)
    compared = commands.add_parser("compare")
    compared.add_argument("data", type=Path)
    compared.add_argument("films", type=Path)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.command == "make":
        pictures = load_pictures(args.pack) if args.pack else None
        scenes, actions = draw_walk(args.kind, MIXTURES[args.mixture], args.seed, args.frames, pictures)
        if args.jitter:
            scenes.poses = shaken(scenes.poses, args.jitter, args.seed)
        write_film(args.path, scenes, actions, tuple(args.size))
        return
    print("| clip | poses | frames | uncertain | right | moves | views |\n|---|---|---|---|---|---|---|")
    for clip in open_data(args.data):
        truth = (args.films / clip.info.source).with_suffix(".npz")
        if truth.exists():
            found = compare(clip, truth)
            shares = (found.uncertain, found.right, found.moves_right, found.views_right)
            print(
                f"| {clip.name} | {clip.info.poses} | {clip.frames} |", *(f"{100 * share:.1f} % |" for share in shares)
            )


if __name__ == "__main__":
    main()
