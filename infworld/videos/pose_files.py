"""Camera poses from files, for films whose poses are known: what each format is, and where it counts from.

All of them become camera-to-world matrices with OpenCV axes (right, down, ahead) at instants of the film.
"""

from __future__ import annotations

import csv
import re
import signal
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from infworld.training.labels import check_poses, read_matrices
from infworld.videos.labelling import Poses, interpolate

AXES = {"opencv": np.eye(3), "opengl": np.diag([1.0, -1.0, -1.0])}
LONGEST_GAP = 0.5  # seconds between two poses that are joined
FORMATS = (
    "a COLMAP model's folder, TUM (.txt, .tum), matrices (.json, .npy), odometry.csv of Stray Scanner, or ARKit Logger"
)


def find_poses(folder: Path, name: str) -> Path | None:
    """The poses of the film `name` (relative to its folder) below `folder`: the same name with another suffix, or a
    folder of that name without one. ValueError if there are several."""
    place = folder / Path(name).with_suffix("")
    found = [path for path in place.parent.glob("*") if path.name == place.name or path.stem == place.name]
    if len(found) > 1:
        raise ValueError(f"several files have the poses of {name}: {', '.join(sorted(p.name for p in found))}")
    return found[0] if found else None


def read_poses(path: Path, axes: str, fps: float, sideways: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Instants (N,) in seconds, rising from the film's start, matrices (N, 4, 4), and the focal length of the width, 0
    if it is not known.

    A COLMAP model counts the film's frames by the number in its images' names, from 0; matrices are one a frame;
    timestamps that lie far from 0 are taken from the first on. axes: of TUM and of matrices, a key of AXES. fps: of the
    film. sideways: quarter turns from the sensor's picture to the upright one, for logs of ARKit, which are of the
    sensor. Raises ValueError for another format and for what is no pose; names the file.
    """
    try:
        times, matrices, focal = _read(path, axes, fps, sideways)
        if len(times) < 2:
            raise ValueError(f"it has {len(times)} poses: expected two or more")
        order = np.argsort(times, kind="stable")
        order = order[np.append(True, np.diff(times[order]) > 0)]
        check_poses(torch.from_numpy(matrices[order]))
    except (ValueError, OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return times[order], matrices[order], focal


def at_frames(times: np.ndarray, matrices: np.ndarray, focal: float, instants: np.ndarray) -> Poses:
    """Poses at the frames' instants (T,) in seconds; none where the file has a gap or has ended."""
    after = np.searchsorted(times, instants).clip(1, len(times) - 1)
    tolerance = 0.5 * np.median(np.diff(times)) + 1e-6
    near = (instants >= times[0] - tolerance) & (instants <= times[-1] + tolerance)
    near &= times[after] - times[after - 1] <= LONGEST_GAP
    found = np.full((len(instants), 4, 4), np.nan)
    found[near] = interpolate(times, matrices, instants[near].clip(times[0], times[-1]))
    fov = 2 * np.degrees(np.arctan(0.5 / focal)) if focal else 0.0
    return Poses(found, np.where(near, 0, -1), np.zeros(len(instants) - 1, bool), "file", float(fov))


def _read(path: Path, axes: str, fps: float, sideways: int) -> tuple[np.ndarray, np.ndarray, float]:
    if path.is_dir():
        return _colmap(path, fps)
    if path.suffix in (".json", ".npy"):
        matrices = read_matrices(path).numpy()
        if matrices.ndim != 3 or matrices.shape[1:] != (4, 4):
            raise ValueError(f"matrices of shape {matrices.shape}: expected (T, 4, 4)")
        return np.arange(len(matrices)) / fps, _turned(matrices, AXES[axes]), 0.0
    if path.suffix not in (".txt", ".tum", ".csv"):
        raise ValueError(f"no known form of poses; known are {FORMATS}")
    rows = [row for row in csv.reader(_lines(path)) if row]
    upright = Rotation.from_euler("z", 90 * sideways, degrees=True).as_matrix()
    if rows and "qw" in (names := [name.strip() for name in rows[0]]):  # Stray Scanner, OpenCV axes
        table = _numbers(rows[1:], len(names))
        columns = [names.index(name) for name in ("timestamp", "x", "y", "z", "qx", "qy", "qz", "qw")]
        return _from_quaternions(table[:, columns], upright)
    if rows and len(rows[0]) == 13:  # ARKit Logger: time and a 3x4 matrix, OpenGL axes
        table = _numbers(rows, 13)
        matrices = np.tile(np.eye(4), (len(table), 1, 1))
        matrices[:, :3] = table[:, 1:].reshape(-1, 3, 4)
        return _from_start(table[:, 0]), _turned(matrices, AXES["opengl"] @ upright), 0.0
    return _from_quaternions(_numbers([" ".join(row).split() for row in rows], 8), AXES[axes])  # TUM


def _colmap(path: Path, fps: float) -> tuple[np.ndarray, np.ndarray, float]:
    before = signal.getsignal(signal.SIGTERM)
    import pycolmap

    signal.signal(signal.SIGTERM, before)  # which the import has taken over
    model = pycolmap.Reconstruction(path)
    images = [image for image in model.images.values() if image.has_pose]
    numbers = [re.findall(r"\d+", Path(image.name).stem) for image in images]
    if not all(numbers):
        raise ValueError("an image has no number in its name, so that it is not known which frame it is")
    matrices = np.tile(np.eye(4), (len(images), 1, 1))
    for matrix, image in zip(matrices, images, strict=True):
        matrix[:3] = image.cam_from_world().inverse().matrix()
    camera = next(iter(model.cameras.values()))
    return np.array([int(n[-1]) / fps for n in numbers]), matrices, camera.mean_focal_length() / camera.width


def _from_quaternions(table: np.ndarray, axes: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """From rows of time, x, y, z, qx, qy, qz, qw."""
    if not np.linalg.norm(table[:, 4:], axis=1).all():
        raise ValueError("it has a quaternion of zeros")
    matrices = np.tile(np.eye(4), (len(table), 1, 1))
    matrices[:, :3, :3] = Rotation.from_quat(table[:, 4:]).as_matrix()
    matrices[:, :3, 3] = table[:, 1:4]
    return _from_start(table[:, 0]), _turned(matrices, axes), 0.0


def _turned(matrices: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Matrices whose camera has other axes (3, 3)."""
    turned = matrices.copy()
    turned[:, :3, :3] = matrices[:, :3, :3] @ axes
    return turned


def _from_start(times: np.ndarray) -> np.ndarray:
    """Instants of a clock that began long before the film, from the first on."""
    return times - times.min() if len(times) and times.min() > 60 else times


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _numbers(rows: list[list[str]], columns: int) -> np.ndarray:
    if wrong := next((row for row in rows if len(row) != columns), None):
        raise ValueError(f"a line has {len(wrong)} values, expected {columns}: known are {FORMATS}")
    table = np.array(rows, dtype=float).reshape(-1, columns)
    if not np.isfinite(table).all():
        raise ValueError("it has values that are not finite")
    return table
