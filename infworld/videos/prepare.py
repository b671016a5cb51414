"""A folder of films -> a folder of clips: one film after the other, each step told, nothing done twice.

`sources.json` in the folder says of every film what became of it; a part of a film that is in there is not made again.
What goes wrong with a film is written down there, and the next film is taken.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from av.error import FFmpegError
from einops import rearrange
from PIL import Image
from torch import Tensor

from infworld import hub
from infworld.actions import UNCERTAIN
from infworld.config import PACKAGE, ModelConfig
from infworld.devices import pick_dtype, pick_vae_dtype
from infworld.files import claimed
from infworld.loading import load_vae
from infworld.pictures import nearest_bucket
from infworld.training.frames import to_video
from infworld.vae import VideoVAE
from infworld.video import FPS
from infworld.videos.dataset import FOLDER, ClipInfo, vae_fingerprint, write_clip
from infworld.videos.labelling import Poses, at_one_pace, find_returns, from_tracks, label
from infworld.videos.mapping import Tracks
from infworld.videos.pose_files import at_frames, find_poses, read_poses
from infworld.videos.reading import SUFFIXES, Film, at_rate, frames, open_film
from infworld.videos.shots import Scan, find_shots, scan

log = logging.getLogger(__name__)

FORMAT = "infworld-sources-1"
CLIP_CHUNKS = 40  # longer shots are made into several clips
MOST_UNCERTAIN = 0.5  # of a clip's frames
KEYFRAMES = ".keyframes-"  # how folders of keyframes begin, while they are needed
THUMBNAILS, THUMBNAIL_WIDTH = 12, 96  # of a clip, pixels

Progress = Callable[[str, int, int], object]  # hears the stage, how much of it is done, and of how much


@dataclass
class Part:
    """What became of seconds start to end of a film: the clip of that name, or none and the reason."""

    start: float
    end: float
    clip: str = ""
    reason: str = ""


@dataclass
class FilmRecord:
    """What became of a film. bytes, modified: of its file. error: why it could not be read."""

    bytes: int
    modified: float
    seconds: float = 0.0
    parts: list[Part] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    error: str = ""
    done: bool = False


class Records:
    """`sources.json` of a folder. Raises ValueError if it is of another model or other settings, or damaged."""

    def __init__(self, folder: Path, settings: dict[str, str]):
        self.path = folder / "sources.json"
        self.films: dict[str, FilmRecord] = {}
        self.settings = settings
        if not self.path.exists():
            return
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"its form is {data['format']!r}")
            found = data["settings"]
            for name, record in data["films"].items():
                self.films[name] = FilmRecord(**{**record, "parts": [Part(**part) for part in record["parts"]]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} cannot be read ({error}): choose another folder for --out") from error
        if found != settings:
            changed = ", ".join(f"{key} {found.get(key)!r}" for key in settings if found.get(key) != settings[key])
            raise ValueError(f"{folder} was made with {changed}: choose another folder for --out")

    def save(self) -> None:
        films = {name: dataclasses.asdict(record) for name, record in self.films.items()}
        text = json.dumps({"format": FORMAT, "settings": self.settings, "films": films}, indent=1)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path)


@dataclass
class Preparation:
    """What to make of the films of `videos`, and where: `out`. captions: by a film's name. poses: a folder of pose
    files, with axes as in `pose_files.AXES`."""

    videos: Path
    out: Path
    config: ModelConfig
    device: torch.device
    captions: Mapping[str, str] = field(default_factory=dict)
    poses: Path | None = None
    axes: str = "opencv"

    def __post_init__(self):
        self.names = find_films(self.videos, self.out)
        if unknown := sorted(set(self.captions) - set(self.names)):
            raise ValueError(f"captions for films that are not in {self.videos}: {', '.join(unknown[:4])}")
        (self.out / FOLDER).mkdir(parents=True, exist_ok=True)
        (self.out / "thumbnails").mkdir(exist_ok=True)
        config = hub.find(self.config) or self.config
        dtype = pick_dtype(self.device, getattr(torch, config.amp_dtype))
        self.vae = load_vae(config, self.device, pick_vae_dtype(dtype))
        self.fingerprint = vae_fingerprint(config)
        settings = {"model": config.name, "vae": self.fingerprint, "axes": self.axes}
        self.records = Records(self.out, {**settings, "poses": str(self.poses.resolve()) if self.poses else ""})

    def run(self, film_begins: Callable[[int, str], object], progress: Progress) -> dict[str, FilmRecord]:
        """Makes what is not there yet; the records of all films. Raises ValueError while another run does it."""
        with claimed(self.records.path):
            for leftover in self.out.glob(f"{KEYFRAMES}*"):  # of a run that was killed
                shutil.rmtree(leftover)
            self._films(film_begins, progress)
        return {name: self.records.films[name] for name in self.names}

    def _films(self, film_begins: Callable[[int, str], object], progress: Progress) -> None:
        for number, name in enumerate(self.names):
            record = self._begin(name)
            if not record.done:
                film_begins(number, name)
                try:
                    self._film(name, record, progress)
                    record.done = True
                except (ValueError, OSError, FFmpegError, RuntimeError) as error:
                    record.error = str(error) or type(error).__name__
                    log.warning("%s: %s", name, record.error)
                self._save()

    def _begin(self, name: str) -> FilmRecord:
        """The record of a film: a new one if its file has changed since; then its clips are removed."""
        stat = (self.videos / name).stat()
        known = self.records.films.get(name)
        if known is None or (known.bytes, known.modified) != (stat.st_size, stat.st_mtime):
            for part in known.parts if known else []:
                self._clip_path(part.clip).unlink(missing_ok=True)
            known = self.records.films[name] = FilmRecord(stat.st_size, stat.st_mtime)
        if not known.done:
            known.error, known.problems = "", []
        return known

    def _save(self) -> None:
        try:
            self.records.save()
        except OSError as error:  # of a full disk: what is done is done again then
            log.warning("cannot write %s: %s", self.records.path, error)

    def _film(self, name: str, record: FilmRecord, progress: Progress) -> None:
        film = open_film(self.videos / name)
        film.problems = record.problems
        record.seconds = film.seconds
        with tempfile.TemporaryDirectory(dir=self.out, prefix=KEYFRAMES) as folder:
            expected = max(1, round(film.seconds * FPS))
            found = scan(film, Path(folder), lambda count: progress("reading", count, max(count, expected)))
            record.seconds = len(found.change) / FPS
            for number, (first, last) in enumerate(
                split(find_shots(found), 1 + CLIP_CHUNKS * self.config.chunk_frames)
            ):
                if number < len(record.parts):
                    continue
                clip = f"{name.replace('/', '_')}-{number + 1}"
                place = Path(folder) / str(number)
                record.parts.append(self._part(film, found, first, last, name, clip, place, progress))
                self._save()

    def _part(
        self, film: Film, found: Scan, first: int, last: int, name: str, clip: str, folder: Path, progress: Progress
    ) -> Part:
        """Makes a clip of frames [first, last) of a film, or says why not."""
        part = Part(first / FPS, last / FPS)
        chunk = self.config.chunk_frames
        if last - first <= chunk:
            part.reason = f"{(last - first) / FPS:.1f} s between two cuts: a clip needs {(chunk + 1) / FPS:.1f} s"
            return part
        try:
            poses = self._poses(film, found, first, last, name, folder, progress)
        except TrackingError as error:
            part.reason = f"no camera poses: {error}"
            return part
        move, view = label(poses, found.lost[first:last], FPS)
        known = np.flatnonzero(poses.model >= 0)
        begin, end = (known[0], known[-1] + 1) if len(known) else (0, 0)
        chunks = int(end - begin - 1) // chunk
        if chunks < 1:
            part.reason = f"the camera was tracked for {max(end - begin, 0) / FPS:.1f} s only"
            return part
        used = slice(begin, begin + 1 + chunks * chunk)
        uncertain = float(((move[used] == UNCERTAIN) | (view[used] == UNCERTAIN))[:-1].mean())
        if uncertain > MOST_UNCERTAIN:
            part.reason = f"{uncertain:.0%} of the frames are uncertain: the camera was tracked in pieces only"
            return part
        part.start, part.end = (first + begin) / FPS, (first + used.stop) / FPS
        self._write(clip, film, part, poses, used, (move[used], view[used]), name, progress)
        part.clip = clip
        return part

    def _poses(
        self, film: Film, found: Scan, first: int, last: int, name: str, folder: Path, progress: Progress
    ) -> Poses:
        path = find_poses(self.poses, name) if self.poses else None
        if path:
            times, matrices, focal = read_poses(path, self.axes, film.fps, film.turns)
            return at_frames(times, matrices, focal, np.arange(first, last) / FPS)
        keys = np.flatnonzero((found.keyframes >= first) & (found.keyframes < last))
        (folder / "images").mkdir(parents=True)
        for key in keys:
            found.files[key].rename(folder / "images" / found.files[key].name)
        return from_tracks(track(folder, progress), found.keyframe_at[keys] - first, last - first)

    def _write(
        self,
        clip: str,
        film: Film,
        part: Part,
        poses: Poses,
        used: slice,
        actions: tuple[np.ndarray, np.ndarray],
        name: str,
        progress: Progress,
    ) -> None:
        bucket = nearest_bucket(film.size[::-1], self.config.buckets)
        count = used.stop - used.start
        thumbnails = Thumbnails(count)
        pictures = thumbnails.watch(cropped(film, bucket, part.start))
        chunk = self.config.chunk_frames
        tensors = encode(self.vae, pictures, (count - 1) // chunk, chunk, lambda n: progress("encoding", n, count))
        matrices, pace = at_one_pace(poses)
        width = bucket[1] / covering(film.size, bucket)[1]  # share of the picture's width that is seen
        fov = 2 * np.degrees(np.arctan(width * np.tan(np.radians(poses.fov_degrees / 2))))
        tensors |= {
            "move": torch.from_numpy(actions[0]),
            "view": torch.from_numpy(actions[1]),
            "poses": torch.from_numpy(matrices[used]),
            "returns": find_returns(matrices[used], poses.model[used], pace, fov),
        }
        info = ClipInfo(
            source=name,
            start=part.start,
            end=part.end,
            model=self.config.name,
            vae=self.fingerprint,
            caption=self.captions.get(name, ""),
            fps=FPS,
            poses=poses.source,
            pace=pace,
            fov_degrees=float(fov),
        )
        thumbnails.save(self.out / "thumbnails" / f"{clip}.jpg")
        write_clip(self._clip_path(clip), info, tensors)

    def _clip_path(self, clip: str) -> Path:
        return self.out / FOLDER / f"{clip}.safetensors"


def find_films(videos: Path, out: Path) -> list[str]:
    """The films below a folder by name, relative to it, except what lies in `out`. ValueError if there are none."""
    if not videos.is_dir():
        raise ValueError(f"no folder {videos}")
    paths = [path for path in videos.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    inside = [path for path in paths if not path.name.startswith(".") and out.resolve() not in path.resolve().parents]
    if not inside:
        raise ValueError(f"{videos} has no video files: known are {', '.join(SUFFIXES)}")
    return sorted(path.relative_to(videos).as_posix() for path in inside)


def split(shots: list[tuple[int, int]], most: int) -> Iterator[tuple[int, int]]:
    """Shots with those of more than `most` frames in equal parts."""
    for first, last in shots:
        parts = -(-(last - first) // most)
        bounds = [first + (last - first) * part // parts for part in range(parts + 1)]
        yield from zip(bounds, bounds[1:], strict=False)


class TrackingError(Exception):
    """COLMAP failed on a shot."""


def track(folder: Path, progress: Progress) -> Tracks:
    """The tracks of folder/images, found in another process. Raises TrackingError with what it said last."""
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    said = folder / "log.txt"
    with said.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "infworld.videos.mapping", str(folder)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # a Ctrl-C is this process's to answer
        )
        try:
            for line in process.stdout or ():
                stage, done, total = line.split()
                progress(stage, int(done), int(total))
            code = process.wait()
        finally:
            process.kill()
            process.wait()
    if code:
        lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        raise TrackingError(f"COLMAP ended with code {code}: {last.strip()[-300:]}")
    return Tracks.load(folder / "tracks.npz")


def covering(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[int, int]:
    """Height and width of pictures of `size` when they are scaled to cover a bucket (spec section 2)."""
    factor = max(bucket[0] / size[0], bucket[1] / size[1])
    return (int(np.ceil(size[0] * factor - 1e-6)), int(np.ceil(size[1] * factor - 1e-6)))


def cropped(film: Film, bucket: tuple[int, int], start: float) -> Iterator[np.ndarray]:
    """A film's pictures (H, W, 3) of a bucket's size from `start` on, FPS a second."""
    size = covering(film.size, bucket)
    top, left = (size[0] - bucket[0]) // 2, (size[1] - bucket[1]) // 2
    for shown in at_rate(frames(film, size, start), FPS, start):
        yield shown.picture[top : top + bucket[0], left : left + bucket[1]]


@torch.inference_mode()
def encode(
    vae: VideoVAE,
    pictures: Iterator[np.ndarray],
    chunks: int,
    chunk_frames: int,
    progress: Callable[[int], object],
) -> dict[str, Tensor]:
    """`picture`, `history` and `targets` of a clip, from 1 + chunks * chunk_frames pictures (H, W, 3) uint8.

    progress: hears the number of frames. Raises ValueError if there are fewer pictures.
    """
    weight = vae.conv1.weight
    first = next(pictures)
    last = torch.from_numpy(first.copy())
    history, targets, state = [], [], None
    latents, state = vae.encode(_video(last[None], weight))
    history.append(latents)
    for chunk in range(chunks):
        new = [torch.from_numpy(picture.copy()) for picture in islice(pictures, chunk_frames)]
        if len(new) < chunk_frames:
            raise ValueError(f"the film ended {chunk_frames - len(new)} frames early when it was read again")
        video = _video(torch.stack([last, *new]), weight)
        latents, state = vae.encode(video[:, :, 1:], state)
        history.append(latents)
        targets.append(vae.encode(video)[0])
        last = new[-1]
        progress(1 + (chunk + 1) * chunk_frames)
    return {
        "picture": torch.from_numpy(first.copy()),
        "history": rearrange(torch.cat(history, 2), "1 c t h w -> t c h w").half().cpu(),
        "targets": rearrange(torch.cat(targets), "k c t h w -> k t c h w").half().cpu(),
    }


def _video(pictures: Tensor, weight: Tensor) -> Tensor:
    return to_video(pictures[None].to(weight.device), weight.dtype)


class Thumbnails:
    """A strip of small pictures, evenly spread over a clip of `frames` frames."""

    def __init__(self, frames: int):
        self.wanted = set(np.linspace(0, frames - 1, THUMBNAILS).astype(int).tolist())
        self.pictures: list[Image.Image] = []

    def watch(self, pictures: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for number, picture in enumerate(pictures):
            if number in self.wanted:
                image = Image.fromarray(picture)
                height = round(THUMBNAIL_WIDTH * image.height / image.width)
                self.pictures.append(image.resize((THUMBNAIL_WIDTH, height), Image.Resampling.BOX))
            yield picture

    def save(self, path: Path) -> None:
        strip = Image.new("RGB", (THUMBNAIL_WIDTH * len(self.pictures), self.pictures[0].height))
        for number, picture in enumerate(self.pictures):
            strip.paste(picture, (number * THUMBNAIL_WIDTH, 0))
        strip.save(path, quality=85)
