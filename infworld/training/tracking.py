"""Curves of a run where the user looks at them: Trackio or TensorBoard, whichever is installed, or neither."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path


class Tracker:
    """Takes numbers by step. folder: of the run; its name is the run's."""

    def __init__(self, folder: Path):
        self._trackio = self._tensorboard = None
        if importlib.util.find_spec("trackio"):
            import trackio

            trackio.init(project="infworld", name=folder.name, resume="allow")
            self._trackio = trackio
        elif importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(folder / "tensorboard"))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        if self._trackio:
            self._trackio.log(dict(values), step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        if self._trackio:
            self._trackio.finish()
        if self._tensorboard:
            self._tensorboard.close()
