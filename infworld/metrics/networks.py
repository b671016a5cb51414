"""Networks that judge pictures: imaging and aesthetic quality as in VBench (Huang et al. 2024), and LPIPS.

Their weights are not part of this project, and nothing is downloaded here. A network is used if its weights lie where
its library keeps them: in torch.hub's folder (`TORCH_HOME`) and in the Hub's cache (`HF_HOME`). docs/measuring.md tells
how they get there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

# In torch.hub's folder, under the names that pyiqa, torchvision and torch.hub give them.
MUSIQ = "pyiqa/musiq_spaq_ckpt-358bb6af.pth"
LPIPS_LAYERS, ALEXNET = "pyiqa/LPIPS_v0.1_alex-df73285e.pth", "checkpoints/alexnet-owt-7be5be79.pth"
AESTHETIC = "checkpoints/sa_0_4_vit_l_14_linear.pth"
CLIP = "openai/clip-vit-large-patch14"  # on the Hub
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 8  # pictures at once

Network = Callable[..., Tensor]  # pictures (B, 3, H, W) in 0..1, one argument or two, -> (B,)


@dataclass(frozen=True)
class Networks:
    """The networks that are at hand, by the name of what they measure, and why others are not."""

    found: dict[str, Network] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")

    def __str__(self) -> str:
        return ", ".join(self.found) or "none"

    def quality(self, frames: np.ndarray) -> dict[str, float]:
        """Imaging and aesthetic quality of frames (T, H, W, 3), means in percent; of the networks that are at hand."""
        return {name: 100 * self._mean(name, frames) for name in self.found if name != "LPIPS"}

    def lpips(self, frames: np.ndarray, others: np.ndarray) -> dict[str, float]:
        """LPIPS of pairs of pictures, (T, H, W, 3) each: mean, 0 for equal ones; empty without the network."""
        return {"LPIPS": self._mean("LPIPS", frames, others)} if "LPIPS" in self.found else {}

    @torch.inference_mode()
    def _mean(self, name: str, *pictures: np.ndarray) -> float:
        batches = zip(*(np.array_split(x, -(-len(x) // BATCH)) for x in pictures), strict=True)
        values = [self.found[name](*(self._tensor(x) for x in batch)) for batch in batches]
        return float(torch.cat(values).mean())

    def _tensor(self, frames: np.ndarray) -> Tensor:
        return torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2).float() / 255


def find_networks(device: torch.device) -> Networks:
    """Loads the networks whose library and weights are on this machine.

    Raises ValueError that names the file for weights that are not the network's.
    """
    found, missing = {}, {}
    for name, load in {"imaging quality": imaging, "aesthetic quality": aesthetic, "LPIPS": lpips}.items():
        try:
            found[name] = load(device)
        except ModuleNotFoundError as error:
            missing[name] = f"{error.name} is not installed"
        except FileNotFoundError as error:
            missing[name] = str(error)
    return Networks(found, missing, device)


def imaging(device: torch.device) -> Network:
    """VBench's imaging quality: MUSIQ (Ke et al. 2021) trained on SPAQ, over 100. Longer sides are at most 512."""
    import pyiqa

    musiq = _load(lambda path: pyiqa.create_metric("musiq-spaq", device=device, pretrained_model_path=path), MUSIQ)
    return lambda pictures: musiq(_at_most(pictures, 512)).flatten() / 100


def aesthetic(device: torch.device) -> Network:
    """VBench's aesthetic quality: LAION's linear predictor on CLIP's ViT-L/14, from 0 to 10, over 10."""
    from transformers import CLIPVisionModelWithProjection

    predictor = nn.Linear(768, 1, device=device)
    _load(lambda path: predictor.load_state_dict(torch.load(path, weights_only=True)), AESTHETIC)
    try:
        clip: Any = CLIPVisionModelWithProjection.from_pretrained(CLIP, local_files_only=True)
    except OSError as error:
        raise FileNotFoundError(f"{CLIP} is not in the Hub's cache") from error
    clip.to(device).eval()
    mean, deviation = (torch.tensor(x, device=device).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_DEVIATION))

    def judge(pictures: Tensor) -> Tensor:
        pictures = (_square(pictures, clip.config.image_size) - mean) / deviation
        return predictor(normalize(clip(pixel_values=pictures).image_embeds, dim=-1)).flatten() / 10

    return judge


def lpips(device: torch.device) -> Network:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018)."""
    import pyiqa

    network = _load(
        lambda path, _: pyiqa.create_metric("lpips", device=device, pretrained_model_path=path), LPIPS_LAYERS, ALEXNET
    )
    return lambda pictures, others: network(pictures, others).flatten()


def _load(load: Callable[..., Any], *names: str) -> Any:
    """What `load` makes of files in torch.hub's folder. FileNotFoundError if one is missing: none is fetched."""
    paths = [Path(torch.hub.get_dir()) / name for name in names]
    for name, path in zip(names, paths, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"{name} is not in torch.hub's folder")
    try:
        with redirect_stdout(sys.stderr):  # pyiqa prints what it loads
            return load(*map(str, paths))
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"not the weights of this name, {' and '.join(map(str, paths))}: {error}") from error


def _at_most(pictures: Tensor, side: int) -> Tensor:
    """Pictures whose longer side is at most `side`."""
    scale = side / max(pictures.shape[-2:])
    return interpolate(pictures, scale_factor=scale, mode="bilinear") if scale < 1 else pictures


def _square(pictures: Tensor, side: int) -> Tensor:
    """The middle of pictures, resized: (B, 3, side, side)."""
    shape = [round(length * side / min(pictures.shape[-2:])) for length in pictures.shape[-2:]]
    resized = interpolate(pictures, shape, mode="bicubic").clamp(0, 1)
    top, left = ((length - side) // 2 for length in shape)
    return resized[..., top : top + side, left : left + side]
