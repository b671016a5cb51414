"""What a run of fine-tuning or distillation keeps: its whole state, the model for use, films of the model so far."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import infworld
from infworld import lora
from infworld.actions import ActionScript
from infworld.checkpoint import save_tensors
from infworld.config import ModelConfig, to_dict
from infworld.files import temporary_path
from infworld.loading import loras_of, read_transformer
from infworld.training.parts import lora_matrices
from infworld.video import Mp4Writer
from infworld.videos.dataset import Clip

WEIGHTS, LORA, MODEL, STATE = "world.safetensors", "lora.safetensors", "model.yaml", "state.pt"
FILM_CHUNKS = 2


class RunFolder:
    """What a run keeps: the whole state, and the model for use, with `infworld generate --model FOLDER/model.yaml`.

    config: of the model that is fine-tuned, with absolute paths.
    """

    def __init__(self, folder: Path, config: ModelConfig, changes: Mapping[str, Any] | None = None):
        """changes: fields of the saved model's config that differ. Raises ValueError for a folder that cannot be
        made."""
        self.folder, self.config, self.changes = folder, config, dict(changes or {})
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {folder}: {error}") from error

    def save(self, state: Mapping[str, Any]) -> None:
        """The state, for `state`, and its averaged weights, for use; each file whole or not at all.

        Raises ValueError where they cannot be written; what was there before is kept.
        """
        self._save_state(state)
        path = self.folder / WEIGHTS
        own = read_transformer(self.config)
        save_tensors(path, {name: state["average"].get(name, t).to(t.dtype) for name, t in own.items()})
        self._save_config(checkpoint_path=WEIGHTS, loras=())

    def save_lora(self, state: Mapping[str, Any], rank: int, facts: Mapping[str, Any], name: str = "default") -> None:
        """As `save`, with the averaged weights as a LoRA. facts: said in its file and on its card. name: of the set in
        the model."""
        self._save_state(state)
        metadata = {"model": self.config.name, "alpha": str(rank), "rank": str(rank)}
        metadata |= {key: str(value) for key, value in facts.items()}
        lora.save(self.folder / LORA, lora_matrices(state["average"], name), metadata)
        self._save_config(loras=(*map(str, loras_of(self.config)), LORA))

    def _save_config(self, **changes: Any) -> None:
        changes = {"name": f"{self.config.name}-{self.folder.name}", **self.changes, **changes}
        text = yaml.safe_dump(to_dict(dataclasses.replace(self.config, **changes)), sort_keys=False)
        (self.folder / MODEL).write_text(text, encoding="utf-8")

    def _save_state(self, state: Mapping[str, Any]) -> None:
        path = self.folder / STATE
        part = temporary_path(path)
        try:
            torch.save(dict(state), part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            raise ValueError(f"cannot write {path}: {error}; the one before is kept, so make room and go on") from error
        finally:
            part.unlink(missing_ok=True)

    def state(self) -> dict[str, Any] | None:
        """The state of an earlier run in this folder, if there is one. Raises ValueError for a damaged one."""
        path = self.folder / STATE
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can fail in any way at all
            raise ValueError(f"{path} is damaged: delete it to begin anew ({error})") from error

    def film(self, clip: Clip, device: torch.device, step: int, preset: str | None = None) -> Path:
        """Films the beginning of a clip's walk from its first frame with the saved model; returns the mp4. preset: None
        for the model's own."""
        path = self.folder / "films" / f"step-{step:06d}.mp4"
        path.parent.mkdir(exist_ok=True)
        world = infworld.load(self.folder / MODEL, str(device))
        frames = 1 + min(FILM_CHUNKS, clip.chunks) * world.config.chunk_frames
        actions = ActionScript.from_pairs(map(tuple, clip.actions.T[: frames - 1].tolist()))
        picture, caption = clip.read("picture").numpy(), clip.info.caption
        with Mp4Writer(path, world.config.validation_data.fps) as film:
            for chunk in world.rollout(picture, actions, caption, frames, preset=preset):
                film.write(chunk.frames)
        return path
