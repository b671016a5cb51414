"""Low-rank changes (LoRA) of a transformer: their files, and merging them into its weights as they are loaded.

A file has, for each changed layer NAME of the transformer, `NAME.lora_A.weight` (rank, inputs) and `NAME.lora_B.weight`
(outputs, rank), of a convolution with its kernel's axes; they change `NAME.weight` by weight * alpha / rank * B A. The
names are those of the released tensors, which Wan 2.1 has too, with or without the prefixes of PEFT and ComfyUI.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from infworld.checkpoint import read_metadata, read_tensors, save_tensors

FORMAT = "infworld-lora-1"
SUFFIX = ".safetensors"
PREFIXES = ("base_model.model.", "diffusion_model.")
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")


@dataclass(frozen=True)
class LoraChoice:
    """A LoRA to use: its file, or its repository on the Hub, and how strongly."""

    source: str
    weight: float = 1.0

    @staticmethod
    def parse(text: str) -> LoraChoice:
        """Reads "FILE" or "FILE:weight". Raises ValueError for a weight that is no finite number."""
        source, colon, weight = text.rpartition(":")
        if not colon or text.endswith(SUFFIX) or "/" in weight or "\\" in weight:
            return LoraChoice(text)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"the weight of the LoRA {source} must be a number such as 0.8, not {weight!r}")
        return LoraChoice(source, number)

    def found_by(self, find: Callable[[str], Path]) -> LoraChoice:
        """The same with the path that `find` gives its file."""
        return LoraChoice(str(find(self.source)), self.weight)

    def __str__(self) -> str:
        return self.source if self.weight == 1 else f"{self.source}:{self.weight:g}"


@dataclass(frozen=True)
class Lora:
    """The matrices A and B by layer, and what is known of them. model: what they were trained on, "" if not known."""

    path: Path
    layers: Mapping[str, tuple[Tensor, Tensor]]
    model: str
    metadata: Mapping[str, str]

    @staticmethod
    def load(path: str | Path) -> Lora:
        """Raises FileNotFoundError for a missing file, ValueError for one that is damaged or no LoRA; names the
        tensor."""
        path = Path(path).expanduser()
        if path.suffix != SUFFIX:
            raise ValueError(f"{path} is no LoRA by its name: it must be a {SUFFIX} file")
        metadata = read_metadata(path)
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in read_tensors(path).items():
            match = _MATRIX.fullmatch(name)
            if match is None:
                raise ValueError(f"{path} has {name}: a LoRA has NAME.lora_A.weight and NAME.lora_B.weight only")
            layer, part = match.groups()
            for prefix in PREFIXES:
                layer = layer.removeprefix(prefix)
            found.setdefault(layer, {})[part] = tensor
        for layer, parts in found.items():
            if missing := {"A", "B"} - parts.keys():
                raise ValueError(f"{path} has no {layer}.lora_{missing.pop()}.weight beside the other matrix")
        layers = {layer: (parts["A"], parts["B"]) for layer, parts in found.items()}
        return Lora(path, layers, metadata.get("model", ""), metadata)

    @property
    def alpha(self) -> float | None:
        """What the product of the matrices is multiplied by, times the rank; None: the rank itself."""
        try:
            return float(self.metadata["alpha"]) if "alpha" in self.metadata else None
        except ValueError as error:
            raise ValueError(f"{self.path} has the alpha {self.metadata['alpha']!r}, which is no number") from error

    def change(self, layer: str) -> Tensor:
        """What is added to the layer's weight at a weight of 1, (outputs, inputs times the kernel) float32."""
        a, b = (matrix.float().flatten(1) for matrix in self.layers[layer])
        return (1.0 if self.alpha is None else self.alpha / len(a)) * (b @ a)


def merge(tensors: Mapping[str, Tensor], choices: Iterable[LoraChoice], model: str) -> dict[str, Tensor]:
    """A transformer's tensors with the changes of LoRAs added; those that are changed become float32.

    model: its name, for errors. Raises ValueError for a LoRA that does not fit, naming tensor and model.
    """
    merged = dict(tensors)
    for choice in choices:
        lora = Lora.load(choice.source)
        check_fit(lora, merged, model)
        for layer in lora.layers:
            weight = merged[f"{layer}.weight"]
            change = choice.weight * lora.change(layer).view(weight.shape)
            merged[f"{layer}.weight"] = weight.float() + change
    return merged


def check_fit(lora: Lora, tensors: Mapping[str, Tensor], model: str) -> None:
    """Raises ValueError if the LoRA is not for these tensors, those of the model of that name."""
    made = f" (it was made for {lora.model!r})" if lora.model else ""
    for layer, (a, b) in lora.layers.items():
        name = f"{layer}.weight"
        if name not in tensors:
            raise ValueError(f"{lora.path} changes {name}, which the model {model!r} does not have{made}")
        weight = tensors[name]
        if a.ndim < 2 or a.ndim != b.ndim or len(a) != b.shape[1] or b[0, 0].numel() != 1:
            raise ValueError(f"{lora.path}: {layer}.lora_A is {tuple(a.shape)} and lora_B {tuple(b.shape)}: no product")
        if (len(b), *a.shape[1:]) != tuple(weight.shape):
            raise ValueError(
                f"{lora.path} changes {name} of {(len(b), *a.shape[1:])}, and that of the model {model!r} is "
                f"{tuple(weight.shape)}{made}: use it with its own model"
            )


def save(path: str | Path, layers: Mapping[str, tuple[Tensor, Tensor]], metadata: Mapping[str, str]) -> None:
    """Writes matrices A and B by layer, as float16, whole or not at all.

    metadata: texts, among them `model` (a name) and `alpha`. Raises ValueError if the file cannot be written.
    """
    tensors = {f"{layer}.lora_A.weight": a for layer, (a, _) in layers.items()}
    tensors |= {f"{layer}.lora_B.weight": b for layer, (_, b) in layers.items()}
    save_tensors(path, tensors, {"format": FORMAT, **metadata}, dtype=torch.float16)


def card(lora: Lora, repo: str, base: str = "") -> str:
    """A model card for the repository `repo` of the Hub. base: repository of the model that it changes, if known."""
    head = {"tags": ["lora", "world-model", "infinite-world"], **({"base_model": base} if base else {})}
    facts = {name: text for name, text in lora.metadata.items() if name not in ("format", "model")}
    model = lora.model or "infinite-world"
    return "\n".join(
        [
            f"---\n{yaml.safe_dump(head)}---",
            f"# {repo.rpartition('/')[2]}\n",
            f"A LoRA for the world model {lora.model or 'Infinite-World'}, {len(lora.layers)} layers.\n",
            f"    infworld generate --model {model} --lora {repo} --image PICTURE --out film.mp4\n",
            "| how it was made | |\n|---|---|",
            *(f"| {name.replace('_', ' ')} | {text} |" for name, text in sorted(facts.items())),
            "",
        ]
    )
