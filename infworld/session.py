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
from infworld.presets import EXACT
from infworld.settings import FilmSettings, check_seed
from infworld.vae import PIXELS_PER_LATENT

SESSION_FORMAT = "infworld-session-1"


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
    settings: FilmSettings
    num_frames: int = 1

    def with_settings(self, settings: FilmSettings) -> Session:
        """The same film with other settings for the frames to come.

        `settings.actions` are the whole film's, of which the frames so far keep the session's own. The seed and the
        noise go on as they are: `with_seed` begins anew.
        """
        session = self.with_actions(ActionScript.from_pairs(settings.actions.pairs(self.num_frames - 1)))
        kept = {"actions": session.settings.actions, "seed": self.settings.seed}
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
        """Writes one `.safetensors` file. ValueError if it cannot be written."""
        tensors = {"history": self.history, "generator_state": self.generator_state}
        tensors["picture"] = torch.from_numpy(self.picture)
        tensors |= {f"encoder_state.{name}": tensor for name, tensor in self.encoder_state.items()}
        tensors |= {f"chunk_latents.{i}": tensor for i, tensor in enumerate(self.chunk_latents)}
        values = {"model": self.model, "num_frames": self.num_frames, **vars(self.settings)}
        values["actions"] = [[s.move, s.view, s.frames] for s in self.settings.actions.segments]
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
            if values.keys() != _VALUES:
                raise ValueError("it lacks fields or has others")
            for name, kind in (("model", str), ("num_frames", int)):
                if type(values[name]) is not kind:
                    raise ValueError(f"{name} is {values[name]!r}")
            values["actions"] = ActionScript(Segment(*segment) for segment in values["actions"])
            session = Session(
                model=values.pop("model"),
                picture=tensors["picture"].numpy(),
                history=tensors["history"],
                encoder_state=_under("encoder_state.", tensors),
                chunk_latents=tuple(
                    tensors[f"chunk_latents.{i}"] for i in range(len(_under("chunk_latents.", tensors)))
                ),
                generator_state=tensors["generator_state"],
                num_frames=values.pop("num_frames"),
                settings=FilmSettings(**values),
            )
            torch.Generator().set_state(session.generator_state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the session file {path} is damaged: {error}") from error
        return session


_VALUES = {"model", "num_frames", *(field.name for field in dataclasses.fields(FilmSettings))}
_OLDER = {"preset": EXACT.name}  # what files say that were saved before there was such a field


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
    """State of a CPU generator, whose noise is the same on every device. Raises ValueError for an invalid seed."""
    check_seed(seed)
    return torch.Generator().manual_seed(seed).get_state()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
