"""Clips on disk: latents, actions and poses of films, one safetensors file a clip, read lazily (docs/own-videos.md).

A folder DATA has `clips/NAME.safetensors` and nothing else that training needs. A clip of k chunks shows T = 1 + 80 k
frames, 30 a second, at one of its model's sizes. Everything is as inference has it: `history` is the continued encoding
of the whole clip, `targets` are the fresh encodings of each chunk's 81 frames (spec sections 4 and 9).

    for clip in open_data("DATA", config):
        sample = clip.sample(start=2, chunks=4)  # chunks 2 to 5 as history, chunk 6 as target
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor

from infworld.actions import MOVES, UNCERTAIN
from infworld.checkpoint import check_file, open_safetensors, read_tensors, save_tensors
from infworld.config import ModelConfig

FORMAT = "infworld-clip-1"
FOLDER = "clips"
POSE_SOURCES = ("colmap", "turning", "file", "none")
_DTYPES = {
    **{"history": torch.float16, "targets": torch.float16, "picture": torch.uint8},
    **{"move": torch.uint8, "view": torch.uint8, "poses": torch.float32, "returns": torch.int32},
}


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a clip besides its tensors.

    source: the video file, relative to the folder it was in. start, end: seconds in it. caption: may be empty. model,
    vae: name of the model and `vae_fingerprint` of the VAE that made the latents. poses: where they come from:
    `colmap`, `turning` (the camera stayed in one place: rotations only), `file`, or `none`. pace: units of the poses
    per frame while the camera walks as it usually does, 0 if it never walks. fov_degrees: horizontal field of view of
    the clip's frames, 0 if not known.
    """

    source: str
    start: float
    end: float
    model: str
    vae: str
    caption: str = ""
    fps: float = 30.0
    poses: str = "none"
    pace: float = 0.0
    fov_degrees: float = 0.0


@dataclass
class Sample:
    """What one sample of training needs: history (C, 1 + 20 n, h, w) and target (C, 21, h, w), float32; move and view
    (81,) int64, as `World` feeds them: the first is the action that leads out of the history's last frame; the
    caption."""

    history: Tensor
    target: Tensor
    move: Tensor
    view: Tensor
    caption: str


class Clip:
    """One clip on disk. Opening it reads its header and checks it; tensors are read when they are asked for.

    Tensors by name, for k chunks of 80 frames, latents of C channels and h x w:

    | name | shape, dtype | what |
    |---|---|---|
    | `history` | (1 + 20 k, C, h, w) float16 | the whole clip's continued encoding |
    | `targets` | (k, 21, C, h, w) float16 | chunk i's fresh encoding: frames 80 i to 80 i + 80 |
    | `picture` | (H, W, 3) uint8 | the first frame |
    | `move`, `view` | (T,) uint8 | action i leads from frame i to i + 1; 9 is *uncertain* |
    | `poses` | (T, 4, 4) float32 | camera to world, OpenCV axes; NaN where not known |
    | `returns` | (T,) int32 | the last earlier frame that saw the same and was left in between, or -1 |
    """

    def __init__(self, path: Path):
        """Raises FileNotFoundError for a missing file, ValueError for one that is damaged or of another form."""
        self.path = check_file(path)
        with self._open() as file:
            metadata = file.metadata() or {}
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
            shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
            dtypes = {name: part.get_dtype() for name, part in found.items()}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no clip of the form {FORMAT}: make it with `infworld prepare-videos`")
        self.info = _info(metadata.get("clip", ""), path)
        self.chunks = _check_shapes(shapes, dtypes, path)
        self.latent_shape: tuple[int, int, int] = shapes["history"][1:]
        self.size: tuple[int, int] = shapes["picture"][:2]
        self.new_latents = (shapes["history"][0] - 1) // self.chunks
        self.chunk_frames = (shapes["move"][0] - 1) // self.chunks

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def frames(self) -> int:
        """T = 1 + 80 k."""
        return 1 + self.chunks * self.chunk_frames

    @cached_property
    def actions(self) -> Tensor:
        """Move and view of every frame, (2, T) int64. Raises ValueError for an index beyond 9."""
        actions = torch.stack([self.read("move"), self.read("view")]).long()
        if actions.max() >= len(MOVES):
            raise ValueError(f"{self.path} has an action {int(actions.max())}: known are 0 to {len(MOVES) - 1}")
        return actions

    @property
    def uncertain(self) -> float:
        """Share of the frames whose move or view is *uncertain*."""
        return (self.actions[:, :-1] == UNCERTAIN).any(0).float().mean().item()

    def read(self, name: str, first: int | None = None, last: int | None = None) -> Tensor:
        """The tensor of that name, or its rows [first, last) alone; nothing else is read."""
        with self._open() as file:
            return file.get_slice(name)[first:last]

    def sample(self, start: int, chunks: int) -> Sample:
        """Chunks [start, start + chunks) as history, the next one as target. With chunks = 0 the history is the
        picture alone.

        A history that begins inside the clip begins with that chunk's fresh encoding and goes on with the clip's own
        latents: by then the encoder has forgotten what it saw before (`training.data.WalkPool.select`).
        Raises ValueError for chunks that the clip does not have.
        """
        end = start + chunks
        if not 0 <= start <= end < self.chunks:
            raise ValueError(f"{self.name} has chunks 0 to {self.chunks - 1}: no history {start} to {end} and a target")
        known = 1 + chunks * self.new_latents
        begun = self.read("targets", start, start + 1)[0, :known]
        rest = start * self.new_latents
        own = self.read("history", rest + len(begun), rest + known)
        frames = slice(end * self.chunk_frames, (end + 1) * self.chunk_frames + 1)
        move, view = self.actions[:, frames]
        return Sample(
            history=rearrange(torch.cat([begun, own]), "t c h w -> c t h w").float(),
            target=rearrange(self.read("targets", end, end + 1)[0], "t c h w -> c t h w").float(),
            move=move,
            view=view,
            caption=self.info.caption,
        )

    def needs(self, chunks: int) -> Tensor:
        """Of every sample with a history of that many chunks, by its start: the share of the target's frames that show
        what the history saw and then lost sight of, so that only a memory can draw them. (self.chunks - chunks,)"""
        seen = self._returns[1:].unflatten(0, (self.chunks, self.chunk_frames))[chunks:]
        begun = self.chunk_frames * torch.arange(self.chunks - chunks)[:, None]
        return ((begun <= seen) & (seen <= begun + self.chunk_frames * chunks)).float().mean(1)

    @cached_property
    def _returns(self) -> Tensor:
        return self.read("returns").long()

    def _open(self):
        try:
            return open_safetensors(self.path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}; delete it and prepare the videos again") from error


def write_clip(path: Path, info: ClipInfo, tensors: Mapping[str, Tensor]) -> None:
    """Writes a clip, whole or not at all. tensors: all of `Clip`'s, cast to the dtypes there.

    Raises ValueError for missing, extra or misshapen tensors, and if the file cannot be written.
    """
    tensors = {name: tensor.to(_DTYPES.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    _check_shapes({name: tuple(t.shape) for name, t in tensors.items()}, {}, path)
    save_tensors(path, tensors, {"format": FORMAT, "clip": json.dumps(asdict(info))})


def open_data(folder: str | Path, config: ModelConfig | None = None) -> list[Clip]:
    """All clips of a folder, by name, with their headers checked.

    config: of the model that shall learn from them; its VAE must be the one that made them.
    Raises FileNotFoundError for no folder, ValueError for one without clips, a damaged clip, and clips of another VAE,
    number of channels or frames per chunk than the config's.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: make it with `infworld prepare-videos VIDEOS --out {folder}`")
    clips = list(_clips(folder))
    if not clips:
        raise ValueError(f"{folder} has no clips: make them with `infworld prepare-videos VIDEOS --out {folder}`")
    if config:
        check_model(clips, config)
    return clips


def _clips(folder: Path) -> Iterator[Clip]:
    for path in sorted((folder / FOLDER).glob("*.safetensors")):
        if not path.name.startswith("."):
            yield Clip(path)


def check_model(clips: list[Clip], config: ModelConfig) -> None:
    """Raises ValueError for clips that this model cannot learn from; names the first."""
    vae, space = vae_fingerprint(config), config.vae_cfg.space
    for clip in clips:
        info, (height, width) = clip.info, clip.size
        if info.vae != vae:
            raise ValueError(
                f"{clip.path} was made with the VAE {info.vae} of {info.model!r}, and {config.name!r} has {vae}: "
                f"prepare the videos again with --model {config.name}"
            )
        expected = (config.vae_cfg.z_dim, height // space, width // space)
        if clip.latent_shape != expected or (height, width) not in config.buckets:
            raise ValueError(
                f"{clip.path} has latents {clip.latent_shape} of {height}x{width}, which is no size of {config.name!r}"
            )
        if clip.chunk_frames != config.chunk_frames:
            raise ValueError(f"{clip.path} has chunks of {clip.chunk_frames} frames, not {config.chunk_frames}")


def vae_fingerprint(config: ModelConfig) -> str:
    """16 hex digits that tell a config's VAE from others, by its weights and its latents' normalisation.

    The same for the released torch file and its conversion. Errors as `read_tensors`.
    """
    digest = hashlib.sha256(repr((config.vae_cfg.latents_mean, config.vae_cfg.latents_std)).encode())
    for name, tensor in sorted(read_tensors(config.path(config.vae_cfg.vae_pth)).items()):
        digest.update(name.encode() + tensor.float().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _info(text: str, path: Path) -> ClipInfo:
    try:
        data = json.loads(text)
        if set(data) != {field.name for field in fields(ClipInfo)}:
            raise ValueError(f"its entries are {', '.join(sorted(data))}")
        info = ClipInfo(**data)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} does not say what clip it is: {error}; prepare the videos again") from error
    if info.poses not in POSE_SOURCES:
        raise ValueError(f"{path} has poses from {info.poses!r}: known are {', '.join(POSE_SOURCES)}")
    return info


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], path: Path) -> int:
    """The number of chunks. dtypes: of a file, by safetensors' names; none to check for tensors not yet written."""
    if wrong := sorted(set(shapes) ^ set(_DTYPES)):
        raise ValueError(f"{path} has missing or extra tensors ({', '.join(wrong)}): a clip has {', '.join(_DTYPES)}")
    names = {torch.float16: "F16", torch.uint8: "U8", torch.float32: "F32", torch.int32: "I32"}
    for name, found in dtypes.items():
        if found != names[_DTYPES[name]]:
            raise ValueError(f"{path}: {name} is {found}, expected {names[_DTYPES[name]]}")
    targets, frames = shapes["targets"], shapes["move"][0] if shapes["move"] else 0
    chunks = targets[0] if len(targets) == 5 else 0
    if chunks < 1 or (frames - 1) % chunks or (frames - 1) // chunks != 4 * (targets[1] - 1):
        raise ValueError(f"{path}: targets {targets} and move {shapes['move']} are no whole chunks")
    expected = {
        "history": (1 + chunks * (targets[1] - 1), *targets[2:]),
        **{"move": (frames,), "view": (frames,), "poses": (frames, 4, 4), "returns": (frames,)},
    }
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise ValueError(f"{path}: {name} is {shapes[name]}, expected {shape} as targets are {targets}")
    if len(shapes["picture"]) != 3 or shapes["picture"][2] != 3:
        raise ValueError(f"{path}: picture is {shapes['picture']}, expected (H, W, 3)")
    return chunks
