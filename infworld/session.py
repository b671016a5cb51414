"""All that one film needs to go on, as a value on the CPU that can be saved and sent (spec section 9)."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mode
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from infworld.actions import ActionScript, Segment
from infworld.checkpoint import open_safetensors, save_tensors
from infworld.config import FRAMES_PER_LATENT, ModelConfig, VAEConfig
from infworld.presets import EXACT
from infworld.settings import FilmSettings, check_seed
from infworld.vae import FRAMES, FeatureCache, build_vae

SESSION_FORMAT = "infworld-session-1"
MAX_VALUES = 1_000_000  # characters of a session file's JSON
MAX_NAME = 200  # characters of a model's name
ENOUGH_FRAMES = 20  # after which an encoder's state has its full shape
_VALUES = {"model", "num_frames", *(field.name for field in dataclasses.fields(FilmSettings))}
_OLDER = {"preset": EXACT.name}  # what files say that were saved before there was such a field
_FLOATS = ("F32", "F16", "BF16")

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Session:
    """One film's state between chunks: CPU tensors and plain values only.

    history: latents of all known frames, (1, 16, T, h, w), T = 1 + a quarter of the other frames. encoder_state: what
    the VAE encoder carries on. chunk_latents: the sampled latents of each chunk, (1, 16, 1 + frames / 4, h, w) float16,
    from which the film can be shown again. picture: (1, H, W, 3) uint8. generator_state: of the noise generator.
    """

    model: str
    picture: np.ndarray
    history: Tensor
    encoder_state: dict[str, Tensor]
    chunk_latents: tuple[Tensor, ...]
    generator_state: Tensor
    settings: FilmSettings
    num_frames: int = 1

    def with_settings(self, settings: FilmSettings) -> Session:
        """The same film with other settings for the frames to come.

        `settings.actions` are the whole film's, of which the frames so far keep the session's own. The seed and the
        noise go on as they are: `with_seed` begins anew.
        """
        session = self.with_actions(ActionScript.from_pairs(settings.actions.pairs(self.num_frames - 1)))
        kept: dict[str, Any] = {"actions": session.settings.actions, "seed": self.settings.seed}
        return dataclasses.replace(self, settings=dataclasses.replace(settings, **kept))

    def with_actions(self, actions) -> Session:
        """The same film with other actions for the frames to come (anything `ActionScript.of` takes)."""
        return self.replace_settings(actions=self.settings.actions.cut(self.num_frames - 1) + ActionScript.of(actions))

    def with_prompt(self, prompt: str, negative_prompt: str | None = None) -> Session:
        """The same film with another prompt for what comes; the negative prompt stays unless given."""
        negative = self.settings.negative_prompt if negative_prompt is None else negative_prompt
        return self.replace_settings(prompt=prompt, negative_prompt=negative)

    def with_seed(self, seed: int) -> Session:
        """The same film with fresh noise from `seed` for what comes. Raises ValueError for an invalid seed."""
        return dataclasses.replace(self.replace_settings(seed=seed), generator_state=generator_state_of(seed))

    def replace_settings(self, **settings) -> Session:
        """The session with these fields of its settings replaced, and nothing else."""
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, **settings))

    def save(self, path: str | Path) -> None:
        """Writes one `.safetensors` file. Raises ValueError if it cannot be written."""
        values = {"model": self.model, "num_frames": self.num_frames, **vars(self.settings)}
        values["actions"] = [[s.move, s.view, s.frames] for s in self.settings.actions.segments]
        save_tensors(path, self._tensors(), {"format": SESSION_FORMAT, "session": json.dumps(values)})

    @staticmethod
    def load(path: str | Path) -> Session:
        """Reads what `save` wrote, and checks all that can be checked without the model's config (`check_session`).

        The file's header is checked before its tensors are read. Raises FileNotFoundError for a missing file and
        ValueError for a file that is not a valid session; of its path the message contains only the name.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no session file at {path}")
        try:
            file = open_safetensors(path)
        except (OSError, SafetensorError) as error:
            kind = "empty" if path.stat().st_size == 0 else "truncated or not a session file of this program"
            raise ValueError(f"{path.name} is {kind}") from error
        with file:
            metadata = file.metadata() or {}
            if metadata.get("format") != SESSION_FORMAT:
                raise ValueError(f"{path.name} is not a session file of this program (format {SESSION_FORMAT})")
            try:
                model, num_frames, settings = _read_values(metadata.get("session", ""))
                entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                _check_kinds({name: entry.get_dtype() for name, entry in entries.items()})
                _check_shapes({name: tuple(entry.get_shape()) for name, entry in entries.items()}, num_frames)
                tensors = {name: file.get_tensor(name) for name in entries}
                _check_numbers(tensors)
            except ValueError as error:
                raise ValueError(f"the session file {path.name} is damaged: {error}") from error
        chunks = _under("chunk_latents.", tensors)
        return Session(
            model=model,
            picture=tensors["picture"].numpy(),
            history=tensors["history"],
            encoder_state=_under("encoder_state.", tensors),
            chunk_latents=tuple(chunks[str(i)] for i in range(len(chunks))),
            generator_state=tensors["generator_state"],
            settings=settings,
            num_frames=num_frames,
        )

    def _tensors(self) -> dict[str, Tensor]:
        """All tensors by their names in a file."""
        return {
            **{"history": self.history, "generator_state": self.generator_state},
            "picture": torch.from_numpy(self.picture),
            **{f"encoder_state.{name}": tensor for name, tensor in self.encoder_state.items()},
            **{f"chunk_latents.{i}": latents for i, latents in enumerate(self.chunk_latents)},
        }


def check_session(session: Session, config: ModelConfig) -> None:
    """Raises ValueError if the session is inconsistent, of another model, or does not fit this config."""
    if session.model != config.name:
        raise ValueError(f"this session was made with the model {session.model!r}, but {config.name!r} is loaded")
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in session._tensors().items()}
        _check_shapes(shapes, session.num_frames)
        size = shapes["picture"][1:3]
        if size in config.buckets:
            _check_sizes(shapes, config, session.num_frames)
    except ValueError as error:
        raise ValueError(f"the session is damaged: {error}") from error
    if size not in config.buckets:
        found, known = f"{size[0]}x{size[1]}", " or ".join(f"{height}x{width}" for height, width in config.buckets)
        raise ValueError(
            f"this session's pictures have {found} pixels, but {config.name!r} makes pictures of {known}: an earlier "
            "version of that model made them"
        )


def generator_state_of(seed: int) -> Tensor:
    """State of a CPU generator, whose noise is the same on every device. Raises ValueError for an invalid seed."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed).get_state()


def _read_values(text: str) -> tuple[str, int, FilmSettings]:
    """Model, number of frames and settings from a session file's JSON."""
    try:
        if len(text) > MAX_VALUES:
            raise ValueError
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its settings are not valid JSON or too long") from error
    values = _OLDER | values if isinstance(values, dict) else {}
    if values.keys() != _VALUES:
        raise ValueError("it lacks fields or has others")
    model, num_frames, segments = (values.pop(name) for name in ("model", "num_frames", "actions"))
    if not isinstance(model, str) or len(model) > MAX_NAME:
        raise ValueError(f"the model is {reprlib.repr(model)}")
    if type(num_frames) is not int:
        raise ValueError(f"num_frames is {reprlib.repr(num_frames)}")
    if not isinstance(segments, list) or not all(isinstance(s, list) and len(s) == 3 for s in segments):
        raise ValueError("its actions are not a list of [move, view, frames]")
    actions = ActionScript(Segment(*segment) for segment in segments)
    return model, num_frames, FilmSettings(actions=actions, **values)


def _check_kinds(dtypes: dict[str, str]) -> None:
    """Checks the tensors' names and dtypes (as a safetensors header has them)."""
    chunks = sum(name.startswith("chunk_latents.") for name in dtypes)
    latents = ["history", *(f"chunk_latents.{i}" for i in range(chunks))]
    latents += [name for name in dtypes if name.startswith("encoder_state.")]
    kinds = {"generator_state": ("U8",), "picture": ("U8",), **dict.fromkeys(latents, _FLOATS)}
    if missing := kinds.keys() - dtypes.keys():
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    if extra := dtypes.keys() - kinds.keys():
        raise ValueError(f"it has unknown tensors: {reprlib.repr(sorted(extra))}")
    for name, allowed in kinds.items():
        if dtypes[name] not in allowed:
            raise ValueError(f"{_shown(name)} has the dtype {dtypes[name]} instead of {' or '.join(allowed)}")


def _check_shapes(shapes: dict[str, tuple[int, ...]], num_frames: int) -> None:
    """Checks a session's shapes, by the names of its tensors in a file, and its number of frames against each other."""
    chunks = [shape for name, shape in shapes.items() if name.startswith("chunk_latents.")]
    for name in ("history", *(name for name in shapes if name.startswith("chunk_latents."))):
        if len(shapes[name]) != 5 or shapes[name][0] != 1 or 0 in shapes[name]:
            raise ValueError(f"{_shown(name)} is {shapes[name]} and not (1, channels, latents, height, width)")
    _, channels, _, height, width = (chunks or [shapes["history"]])[0]
    # Three sources say how long the film is: the one that disagrees is the damaged one.
    by_chunks, by_history, by_frames = (
        sum(shape[2] - 1 for shape in chunks),
        shapes["history"][2] - 1,
        (num_frames - 1) // FRAMES_PER_LATENT,
    )
    added = mode([by_chunks, by_history, by_frames])
    _expect("history", shapes["history"], (1, channels, 1 + added, height, width))
    for i, shape in enumerate(chunks):
        _expect(f"chunk {i}", shape, (1, channels, max(2, shape[2]), height, width))
    if by_chunks != added:
        raise ValueError(f"its chunks have {by_chunks} latents for {added} that were added to the picture's")
    sides = shapes["picture"][1:3] if len(shapes["picture"]) == 4 else (0, 0)
    factor = max(1, sides[0] // height, sides[1] // width)
    _expect("picture", shapes["picture"], (1, height * factor, width * factor, 3))
    if num_frames != 1 + added * FRAMES_PER_LATENT:
        raise ValueError(f"{len(chunks)} chunks do not make {num_frames} frames")


def _check_sizes(shapes: dict[str, tuple[int, ...]], config: ModelConfig, num_frames: int) -> None:
    """Checks the shapes of a session, consistent ones, against a model's."""
    height, width = shapes["picture"][1:3]
    channels, space = config.vae_cfg.z_dim, config.vae_cfg.space
    for name, shape in shapes.items():
        if name == "history" or name.startswith("chunk_latents."):
            latents = shape[2] if name == "history" else min(shape[2], config.chunk_latents)
            what = name.replace("chunk_latents.", "chunk ")
            _expect(what, shape, (1, channels, latents, height // space, width // space))
    lengths = min(num_frames, 1 + ENOUGH_FRAMES), 1  # the picture's own state continues any film
    states = [state for length in lengths for state in _encoder_states(config.vae_cfg, height, width, length)]
    _check_encoder_state(_under("encoder_state.", shapes), states)


def _check_numbers(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        # Sums in float64 cannot overflow, and hold every NaN and infinity.
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64)):
            raise ValueError(f"{_shown(name)} contains NaN or infinite values")
    try:
        torch.Generator().set_state(tensors["generator_state"])
    except (RuntimeError, TypeError) as error:
        raise ValueError("the state of its noise generator is invalid") from error


@lru_cache(maxsize=8)
def _encoder_states(vae_cfg: VAEConfig, height: int, width: int, length: int) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of all states that the encoder may be continued from after `length` frames: without and with (older
    versions) the features of the layers that see every frame."""
    with torch.device("meta"):
        vae = build_vae(vae_cfg)
        encoder = vae.encoder
        fold = vae_cfg.fold
        frames = torch.empty(1, length, height // fold, width // fold, 3 * fold**2)
        cache = FeatureCache()
        encoder(frames, cache)
    states = vae.reduced(cache.state) | {FRAMES: encoder.last_frames(frames)}, cache.state
    return [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in states]


def _check_encoder_state(found: dict[str, tuple[int, ...]], allowed: list[dict[str, tuple[int, ...]]]) -> None:
    if found in allowed:
        return
    expected = next((state for state in allowed if state.keys() == found.keys()), allowed[0])
    if missing := expected.keys() - found.keys():
        raise ValueError(f"its encoder state has no {', '.join(sorted(missing))}")
    if extra := found.keys() - expected.keys():
        raise ValueError(f"its encoder state has unknown tensors: {reprlib.repr(sorted(extra))}")
    for name, shape in expected.items():
        _expect(f"encoder state {name}", found[name], shape)


def _expect(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"its {name} is {found} and not {expected}")


def _shown(name: str) -> str:
    return f"its {name[:60]}"


def _under(prefix: str, items: dict[str, T]) -> dict[str, T]:
    return {name.removeprefix(prefix): item for name, item in items.items() if name.startswith(prefix)}
