"""Camera poses of one shot's keyframes by COLMAP, in a process of its own: what goes wrong in it costs one shot.

    python -m infworld.videos.mapping FOLDER

FOLDER/images has the keyframes, in order by name. FOLDER/tracks.npz is written, the fields of `Tracks`; how far it is
is said on stdout, a line `STAGE DONE TOTAL` at a time. Imports no torch, so that it starts at once.

COLMAP finds places by what shifts against each other, so it loses a camera that only turns. That is what the turns
are for: the rotation that fits the matches of two keyframes best, and what it leaves unexplained.

Importing pycolmap takes over the process's signals, so it is imported where it is used: in this process alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

FEATURES = 2048  # of a keyframe
NEAR = (1, 2, 3, 4, 6, 9, 13)  # keyframes apart that are matched
LOOPS = 8  # every eighth keyframe is matched with every other eighth: the camera may come back
AT_ONCE = 16  # keyframes between two words of progress
FOCAL = 0.8  # of the longer side: a guess to begin with, which COLMAP refines
FOCALS = 0.5 / np.tan(np.radians(np.arange(40, 101, 2)) / 2)  # of the width; which one is it that turns show
STILL = 0.006  # of the width: as far as matches lie from where a mere rotation puts them, if the camera stays in place
STILL_SHARE = 0.8  # of the matches that have to; the rest may be people
STILL_SPAN = 4  # keyframes over which the camera has to stay in place
LEAST_MATCHES = 25
LEAST_MODEL = 12  # keyframes; smaller reconstructions are more often wrong than right
ERROR = 1 / 320  # of the longer side: as far as matches may lie from the geometry of their two pictures
TURNED_ONLY = 0.9  # share of the steps in place from which on there is nothing to reconstruct

Matches = dict[tuple[int, int], np.ndarray]  # of two keyframes: (M, 2, 2) from the middle, in widths


@dataclass
class Tracks:
    """What was found of K keyframes.

    model: (K,) int, the reconstruction that a keyframe is part of, -1 for none; each has its own scale and axes.
    poses: (K, 4, 4) camera to world, OpenCV axes. turns: (K - 1, 3, 3) rotation of keyframe i + 1 as seen from i, NaN
    where there are too few matches. still: (K - 1,) bool, the camera stayed in place. focal: (), of the width.
    """

    model: np.ndarray
    poses: np.ndarray
    turns: np.ndarray
    still: np.ndarray
    focal: np.ndarray

    @staticmethod
    def load(path: Path) -> Tracks:
        with np.load(path) as arrays:
            return Tracks(**{field.name: arrays[field.name] for field in fields(Tracks)})


def track(folder: Path) -> Tracks:
    """The poses of FOLDER/images. COLMAP's files go into the folder."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    _extract(folder, names)
    _match(folder, names)
    matches, guess = _read_matches(folder, names)
    focal = best_focal(matches, guess)
    turns, still = find_turns(matches, len(names), focal)
    model, poses = np.full(len(names), -1), np.full((len(names), 4, 4), np.nan)
    if still.mean() < TURNED_ONLY:
        shown = focal != guess
        _verify(folder, focal)
        model, poses, focal = _reconstruct(folder, names, focal, shown)
        if not shown:  # it has been refined
            turns, still = find_turns(matches, len(names), focal)
    return Tracks(model, poses, turns, still, np.array(focal))


def _extract(folder: Path, names: Sequence[str]) -> None:
    import pycolmap

    with Image.open(folder / "images" / names[0]) as picture:
        width, height = picture.size
    reader = pycolmap.ImageReaderOptions(camera_params=f"{FOCAL * max(width, height)},{width / 2},{height / 2},0")
    options = pycolmap.FeatureExtractionOptions()
    options.sift.max_num_features = FEATURES
    for done in range(0, len(names), AT_ONCE):
        _say("features", done, len(names))
        pycolmap.extract_features(
            folder / "database.db",
            folder / "images",
            names[done : done + AT_ONCE],
            pycolmap.CameraMode.SINGLE,
            reader,
            options,
        )
        if done == 0:
            with pycolmap.Database.open(folder / "database.db") as database:
                reader.existing_camera_id = database.read_all_cameras()[0].camera_id  # one camera took them all


def _match(folder: Path, names: Sequence[str]) -> None:
    import pycolmap

    for done in range(0, len(names), AT_ONCE):
        _say("matches", done, len(names))
        pairs = [(a, a + d) for a in range(done, min(done + AT_ONCE, len(names))) for d in NEAR if a + d < len(names)]
        loops = [a for a in range(done, min(done + AT_ONCE, len(names))) if a % LOOPS == 0]
        pairs += [(a, b) for a in loops for b in range(a + 2 * LOOPS, len(names), LOOPS)]
        listing = folder / "pairs.txt"
        listing.write_text("".join(f"{names[a]} {names[b]}\n" for a, b in pairs))
        if pairs:
            pairing = pycolmap.ImportedPairingOptions(match_list_path=listing)
            pycolmap.match_image_pairs(folder / "database.db", pairing_options=pairing)


def _read_matches(folder: Path, names: Sequence[str]) -> tuple[Matches, float]:
    """Verified matches, and the focal length that was guessed."""
    import pycolmap

    with pycolmap.Database.open(folder / "database.db") as database:
        camera = database.read_all_cameras()[0]
        middle = np.array([camera.width, camera.height]) / 2
        indices = {image.image_id: names.index(image.name) for image in database.read_all_images()}
        points = {i: (database.read_keypoints(i)[:, :2] - middle) / camera.width for i in indices}
        found = {}
        for pair, geometry in zip(*database.read_two_view_geometries(), strict=True):
            one, other = pycolmap.pair_id_to_image_pair(pair)
            inliers = np.asarray(geometry.inlier_matches)
            if len(inliers) >= LEAST_MATCHES:
                both = np.stack([points[one][inliers[:, 0]], points[other][inliers[:, 1]]], 1)
                a, b = indices[one], indices[other]
                found[min(a, b), max(a, b)] = both if a < b else both[:, ::-1]
    return found, camera.mean_focal_length() / camera.width


def _verify(folder: Path, focal: float) -> None:
    """Finds the geometry of all pairs again, with a focal length of `focal` widths. With a wrong one, a walk over even
    ground is taken for a rise from it: what a plane's two views allow too."""
    import pycolmap

    with pycolmap.Database.open(folder / "database.db") as database:
        (camera,) = database.read_all_cameras()
        camera.focal_length = focal * camera.width
        database.update_camera(camera)
        database.clear_two_view_geometries()  # those that are there would be kept
    options = pycolmap.TwoViewGeometryOptions()
    options.ransac.max_error = ERROR * max(camera.width, camera.height)
    pycolmap.geometric_verification(folder / "database.db", two_view_geometry_options=options)


def _reconstruct(folder: Path, names: Sequence[str], focal: float, shown: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Model and pose of every keyframe, the largest model first, and the focal length, which stays if turns showed it.

    All places at once (COLMAP's global mapper): one picture after the other loses its way where the camera turns.
    """
    import pycolmap

    _say("poses", 0, len(names))
    options = pycolmap.GlobalPipelineOptions(min_model_size=LEAST_MODEL)
    adjustment = options.mapper.bundle_adjustment
    adjustment.refine_focal_length = adjustment.refine_extra_params = not shown
    (folder / "models").mkdir()
    found = pycolmap.global_mapping(folder / "database.db", folder / "images", folder / "models", options)
    model, poses = np.full(len(names), -1), np.full((len(names), 4, 4), np.nan)
    largest = sorted(found.values(), key=lambda reconstruction: -reconstruction.num_reg_images())
    for number, reconstruction in enumerate(largest):
        for image in reconstruction.images.values():
            index = names.index(image.name)
            if image.has_pose and model[index] < 0:
                model[index], poses[index] = number, np.eye(4)
                poses[index, :3] = image.cam_from_world().inverse().matrix()
    if not largest:
        return model, poses, focal
    camera = next(iter(largest[0].cameras.values()))
    return model, poses, camera.mean_focal_length() / camera.width


def find_turns(matches: Matches, count: int, focal: float) -> tuple[np.ndarray, np.ndarray]:
    """Turns and still steps of `Tracks` by the matches of `count` keyframes."""
    turns, still = np.full((count - 1, 3, 3), np.nan), np.zeros(count - 1, bool)
    span = min(STILL_SPAN, count - 1)
    quiet: dict[tuple[int, int], bool] = {}
    for (first, last), both in matches.items():
        if last - first <= span:
            turn, off = fit_turn(both, focal)
            quiet[first, last] = off < STILL
            if last - first == 1:
                turns[first] = turn
    for first in range(count - span):
        last = first + span
        between = [pair for pair in combinations(range(first, last + 1), 2) if pair in quiet]
        if (first, last) in quiet and all(quiet[pair] for pair in between):  # not there and back either
            still[first:last] = True
    return turns, still & np.isfinite(turns).all((1, 2))


def best_focal(matches: Matches, guess: float) -> float:
    """The focal length by which the most pairs are explained by a rotation, and those best; the guess if none is."""
    far = [both for (a, b), both in matches.items() if b - a == STILL_SPAN] or list(matches.values())
    off = np.array([[fit_turn(both, focal)[1] for both in far] for focal in FOCALS]).reshape(len(FOCALS), -1)
    explained = np.clip(1 - off / STILL, 0, 1).sum(1)
    if np.ptp(explained) <= 0.1 * len(far):  # a camera that walks, or stands: it shows nothing
        return guess
    return float(FOCALS[int(np.argmax(explained))])


def fit_turn(both: np.ndarray, focal: float) -> tuple[np.ndarray, float]:
    """The rotation (3, 3) of the second camera as seen from the first by matches (M, 2, 2), and how far from where it
    puts them the matches lie, in widths: what four of five do not exceed."""
    rays = np.concatenate([both / focal, np.ones((*both.shape[:2], 1))], 2)
    rays /= np.linalg.norm(rays, axis=2, keepdims=True)
    weights = np.ones(len(both))
    for _ in range(5):
        u, _, vt = np.linalg.svd((rays[:, 0] * weights[:, None]).T @ rays[:, 1])
        turn = u @ np.diag([1, 1, np.linalg.det(u @ vt)]) @ vt
        there = rays[:, 0] @ turn  # the first camera's rays in the axes of the second
        off = np.linalg.norm(there[:, :2] / np.maximum(there[:, 2:], 1e-3) * focal - both[:, 1], axis=1)
        weights = 1 / np.maximum(off, 1e-4)
    return turn, float(np.quantile(off, STILL_SHARE))


def _say(stage: str, done: int, total: int) -> None:
    print(stage, done, total, flush=True)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    np.savez(place / "tracks.npz", **vars(track(place)))
