"""All that one film needs to go on, as a value on the CPU that can be saved and sent (spec section 9)."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from infworld.actions import ActionScript, Segment
from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.config import ModelConfig
from infworld.presets import EXACT, find_preset
from infworld.vae import PIXELS_PER_LATENT

SESSION_FORMAT = "infworld-session-1"
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, eq=False)
class Session:
    """One film's state between chunks: CPU tensors and plain values only.

    history: latents of all known frames, (1, 16, T, h, w), T = 1 + 20 per chunk. encoder_state: what the VAE encoder
    carries on. chunk_latents: the sampled latents of each chunk, (1, 16, 21, h, w) float16, from which the film can
    be shown again. picture: (1, H, W, 3) uint8. generator_state: of the noise generator.
    """

    model: str
    picture: np.ndarray
    history: Tensor
    encoder_state: dict[str, Tensor]
    chunk_latents: tuple[Tensor, ...]
    generator_state: Tensor
    actions: ActionScript
    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    num_frames: int = 1
    preset: str = EXACT.name

    def with_actions(self, actions) -> Session:
        """The same film with other actions for the frames to come (anything `ActionScript.of` takes)."""
        return dataclasses.replace(self, actions=self.actions.cut(self.num_frames - 1) + ActionScript.of(actions))

    def with_prompt(self, prompt: str, negative_prompt: str | None = None) -> Session:
        """The same film with another prompt for what comes; the negative prompt stays unless given."""
        negative = self.negative_prompt if negative_prompt is None else negative_prompt
        return dataclasses.replace(self, prompt=prompt, negative_prompt=negative)

    def with_seed(self, seed: int) -> Session:
        """The same film with fresh noise from `seed` for what comes. ValueError if it is none."""
        return dataclasses.replace(self, seed=seed, generator_state=generator_state_of(seed))

    def save(self, path: str | Path) -> None:
        """Writes one `.safetensors` file. ValueError if it cannot be written."""
        tensors = {"history": self.history, "generator_state": self.generator_state}
        tensors["picture"] = torch.from_numpy(self.picture)
        tensors |= {f"encoder_state.{name}": tensor for name, tensor in self.encoder_state.items()}
        tensors |= {f"chunk_latents.{i}": tensor for i, tensor in enumerate(self.chunk_latents)}
        values = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        values["actions"] = [[s.move, s.view, s.frames] for s in self.actions.segments]
        save_tensors(path, tensors, {"format": SESSION_FORMAT, "session": json.dumps(values)})

    @staticmethod
    def load(path: str | Path) -> Session:
        """Reads what `save` wrote. FileNotFoundError, or ValueError for a file that is no whole session."""
        if not Path(path).expanduser().exists():
            raise FileNotFoundError(f"no session file at {path}")
        metadata = read_metadata(path)
        if metadata.get("format") != SESSION_FORMAT:
            raise ValueError(f"{path} is not a session file of this program (format {SESSION_FORMAT})")
        tensors = read_tensors(path)
        try:
            values = json.loads(metadata["session"])
            values = _OLDER | values if isinstance(values, dict) else {}
            _check_values(values)
            actions = ActionScript(tuple(Segment(*segment) for segment in values.pop("actions")))
            session = Session(
                picture=tensors["picture"].numpy(),
                history=tensors["history"],
                encoder_state=_under("encoder_state.", tensors),
                chunk_latents=tuple(
                    tensors[f"chunk_latents.{i}"] for i in range(len(_under("chunk_latents.", tensors)))
                ),
                generator_state=tensors["generator_state"],
                actions=actions,
                **values,
            )
            torch.Generator().set_state(session.generator_state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the session file {path} is damaged: {error}") from error
        return session


_PLAIN_FIELDS = {
    **{"model": str, "prompt": str, "negative_prompt": str},
    **{"seed": int, "steps": int, "guidance": (int, float), "num_frames": int, "preset": str},
}
_OLDER = {"preset": EXACT.name}  # what files say that were saved before there was such a field


def _check_values(values: object) -> None:
    """Raises ValueError unless `values` are a session file's plain fields, each of its own type, and its actions."""
    if not isinstance(values, dict) or values.keys() != {*_PLAIN_FIELDS, "actions"}:
        raise ValueError("it lacks fields or has others")
    for name, kind in _PLAIN_FIELDS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{name} is {values[name]!r}")
    find_preset(values["preset"])


def check_session(session: Session, config: ModelConfig) -> None:
    """Raises ValueError if the session is not of the model of this config or does not hang together."""
    if session.model != config.name:
        raise ValueError(f"this session was made with the model {session.model!r}, but {config.name!r} is loaded")
    made, channels, per_chunk = len(session.chunk_latents), config.vae_cfg.z_dim, config.chunk_latents
    height, width = session.history.shape[-2:]
    shapes = {
        "picture": (session.picture, (1, height * PIXELS_PER_LATENT, width * PIXELS_PER_LATENT, 3)),
        "history": (session.history, (1, channels, 1 + made * (per_chunk - 1), height, width)),
        **{f"chunk {i}": (z, (1, channels, per_chunk, height, width)) for i, z in enumerate(session.chunk_latents)},
    }
    for name, (found, expected) in shapes.items():
        if tuple(found.shape) != expected:
            raise ValueError(f"the session is damaged: its {name} is {tuple(found.shape)} and not {expected}")
    if session.num_frames != 1 + made * config.chunk_frames:
        raise ValueError(f"the session is damaged: {made} chunks make no {session.num_frames} frames")


def generator_state_of(seed: int) -> Tensor:
    """State of a CPU generator: the noise is the same whatever the device. ValueError for a seed that is none."""
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"the seed must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    return torch.Generator().manual_seed(seed).get_state()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
