"""Compares the engine, tensor by tensor, with what the reference computation made (spec section 10).

    infworld check-parity tests/golden

A folder holds weights, inputs and expected results of any sizes. Every expected tensor is printed with its largest
error relative to the largest expected value; the last line says PASS or FAIL, and a failure exits with 1. A file or
tensor that is missing, or that nobody knows, is a failure too; only dit_io_bf16, which takes a GPU to make, may be left
out, and the last line says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from infworld.actions import ActionScript
from infworld.checkpoint import load_strict, read_tensors
from infworld.config import (
    FRAMES_PER_LATENT,
    ModelConfig,
    RolloutConfig,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
    VAEConfig,
    from_dict,
)
from infworld.devices import pick_device, pick_dtype
from infworld.dit import InfiniteWorldTransformer
from infworld.pictures import to_uint8
from infworld.settings import FilmSettings
from infworld.text import TextEmbedding, UMT5TextEncoder, build_umt5, umt5_names
from infworld.vae import VideoVAE, build_vae
from infworld.world import World

# Largest max|a - b| / max|b| of float32 tensors, decoded pixels, and the transformer in bfloat16.
BAR, PIXEL_BAR, BF16_BAR = 2e-5, 1e-4, 1.5e-2
UINT8_BAR = 1.0  # largest difference of 8-bit pixels

VAE_FIELDS = {"T": {"video", "latents", "decoded"}}
DIT_FIELDS = {
    "T": {"x", "t", "y", "y_mask", "image_cond", "move", "view", "velocity"},
    "hpmc": {"latents", "compressed"},
    "action": {"move", "view", "embedding"},
}
Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Result:
    """One expected tensor: the error of ours and the most that is allowed."""

    name: str
    error: float
    bar: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bar  # false for NaN


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|; infinite where the shapes differ."""
    if ours.shape != expected.shape:
        return float("inf")
    error = (ours.float() - expected.float()).abs().max()
    return (error / expected.float().abs().max()).item() if error != 0 else 0.0


class Golden:
    """A folder of golden form: its config, its tensors and the modules with its weights."""

    def __init__(self, folder: Path, device: torch.device):
        self.folder = folder
        self.device = device

    @cached_property
    def sizes(self) -> dict:
        path = self.folder / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise FileNotFoundError(f"no config at {path}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error

    def section(self, name: str, drop: tuple[str, ...] = ()) -> dict:
        if name not in self.sizes:
            raise ValueError(f"config.json has no section {name!r}")
        return {key: value for key, value in self.sizes[name].items() if key not in drop}

    @cached_property
    def transformer_config(self) -> TransformerConfig:
        return from_dict(TransformerConfig, self.section("dit", drop=("model_max_length",)), "config.json: dit")

    def tensors(self, name: str) -> dict[str, Tensor]:
        tensors = read_tensors(self.folder / f"{name}.safetensors")
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def groups(self, file: str, kinds: dict[str, set[str]]) -> Groups:
        """The tensors of a file by their prefix (`T21`, `hpmc5`, `action`), each group complete and of a known kind."""
        groups: Groups = {}
        for name, tensor in self.tensors(file).items():
            prefix, _, field = name.partition(".")
            groups.setdefault(prefix, {})[field] = tensor
        for prefix, group in groups.items():
            require(file, prefix, set(group), kinds.get(prefix.rstrip("0123456789"), set()))
        for kind in kinds:
            if not any(prefix.rstrip("0123456789") == kind for prefix in groups):
                raise ValueError(f"{file} has no tensors of {kind}")
        return dict(sorted(groups.items(), key=lambda item: natural(item[0])))

    def transformer(self, dtype: torch.dtype) -> InfiniteWorldTransformer:
        return self._load(lambda: InfiniteWorldTransformer(self.transformer_config), "dit_weights", dtype=dtype)

    @property
    def vae_config(self) -> VAEConfig:
        return from_dict(VAEConfig, self.section("vae"), "config.json: vae")

    def vae(self) -> VideoVAE:
        return self._load(lambda: build_vae(self.vae_config), "vae_weights")

    def umt5(self) -> nn.Module:
        if self.section("t5").get("shared_pos"):
            raise ValueError("config.json: t5: shared_pos: umT5 has a position table in every layer")
        config = from_dict(TextConfig, self.section("t5", drop=("shared_pos",)), "config.json: t5")
        return self._load(lambda: build_umt5(config), "t5_weights", rename=umt5_names)

    def _load(self, build: Callable, file: str, rename: Callable = dict, dtype: torch.dtype = torch.float32):
        return load_strict(build, rename(self.tensors(file)), where=file, device=self.device, dtype=dtype)


def check_vae(golden: Golden) -> Iterator[Result]:
    vae = golden.vae()
    for prefix, io in golden.groups("vae_io", VAE_FIELDS).items():
        latents, _ = vae.encode(io["video"])
        yield Result(f"vae_io.{prefix}.latents", relative_error(latents, io["latents"]), BAR)
        decoded = vae.decode(io["latents"])
        yield Result(f"vae_io.{prefix}.decoded", relative_error(decoded, io["decoded"]), PIXEL_BAR)


def check_text(golden: Golden) -> Iterator[Result]:
    io = golden.tensors("t5_io")
    require("t5_io", "it", set(io), {"ids", "mask", "hidden"})
    encoder = UMT5TextEncoder(golden.umt5(), tokenizer=None, model_max_length=io["ids"].shape[1])
    yield Result("t5_io.hidden", relative_error(encoder(io["ids"], io["mask"]), io["hidden"]), BAR)


def check_transformer(golden: Golden) -> Iterator[Result]:
    model = golden.transformer(torch.float32)
    for prefix, io in golden.groups("dit_io", DIT_FIELDS).items():
        if prefix == "action":
            ours = model.action_encoder(io["move"], io["view"])
            yield Result("dit_io.action.embedding", relative_error(ours, io["embedding"]), BAR)
        elif prefix.startswith("hpmc"):
            ours = model.latent_encoder.compress(io["latents"])
            yield Result(f"dit_io.{prefix}.compressed", relative_error(ours, io["compressed"]), BAR)
        else:
            for way, ours in (("plain", plain_velocity(model, io)), ("cached", cached_velocity(model, io))):
                yield Result(f"dit_io.{prefix}.velocity ({way})", relative_error(ours, io["velocity"]), BAR)


def check_transformer_bf16(golden: Golden) -> Iterator[Result]:
    model = golden.transformer(torch.bfloat16)
    inputs = {name: io for name, io in golden.groups("dit_io", DIT_FIELDS).items() if name.startswith("T")}
    expected = golden.tensors("dit_io_bf16")
    require("dit_io_bf16", "it", set(expected), {f"{prefix}.velocity" for prefix in inputs})
    slow = pick_dtype(golden.device, torch.bfloat16) != torch.bfloat16
    for prefix, io in inputs.items():
        with WideConvolutions() if slow else nullcontext():
            velocity = plain_velocity(model, io)
        yield Result(
            f"dit_io_bf16.{prefix}.velocity", relative_error(velocity, expected[f"{prefix}.velocity"]), BF16_BAR
        )


class WideConvolutions(TorchFunctionMode):
    """Takes bfloat16 3-D convolutions in float32 and rounds the result: what bfloat16 hardware does.

    For a CPU that has no instructions for it, where torch's own way takes a hundred times as long.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.conv3d:
            return function(*args, **(kwargs or {}))
        x, weight, bias, *rest = args
        return function(x.float(), weight.float(), bias.float(), *rest, **(kwargs or {})).to(x.dtype)


def plain_velocity(model: InfiniteWorldTransformer, io: dict[str, Tensor]) -> Tensor:
    """Everything computed for this one step."""
    return model(io["x"], io["t"], io["image_cond"], io["move"], io["view"], io["y"].squeeze(1), io["y_mask"])


def cached_velocity(model: InfiniteWorldTransformer, io: dict[str, Tensor]) -> Tensor:
    """What does not depend on noise and timestep is computed once and has served another step before this one."""
    context = model.embed_text(io["y"].squeeze(1), io["y_mask"])
    stream = model.encode_memory(model.latent_encoder(io["image_cond"].to(model.dtype)), context)
    actions = model.action_encoder(io["move"], io["view"])
    model.denoise(-io["x"], io["t"] / 2, stream, actions, context)
    return model.denoise(io["x"], io["t"], stream, actions, context)


def check_rollout(golden: Golden) -> Iterator[Result]:
    """The film through World and Session, chunk by chunk, against one that encodes everything anew."""
    io, chunks = golden.tensors("rollout"), golden.section("rollout")["chunks"]
    numbered = {f"{name}{i}" for i in range(chunks) for name in ("noise", "latents")}
    fields = {"image", "move", "view", "text", "text_mask", "video_u8", "video_last8"}
    require("rollout", "it", set(io), fields | numbered)
    config = rollout_config(golden, io)
    vae: Any = RecordedVAE(golden.vae())
    world = World(config, golden.transformer(torch.float32), vae, GivenText(io["text"].squeeze(1), io["text_mask"]))
    session = start(world, io)
    frames = []
    for i in range(chunks):
        chunk = world.next_chunk(session, noise=io[f"noise{i}"].cpu())
        session = chunk.session
        frames.append(torch.from_numpy(chunk.frames))
        yield Result(f"rollout.latents{i}", relative_error(vae.latents, io[f"latents{i}"]), BAR)
    video_u8 = torch.cat(frames).permute(3, 0, 1, 2).unsqueeze(0).float()
    same_shape = video_u8.shape == io["video_u8"].shape
    error = (video_u8 - io["video_u8"].cpu().float()).abs().max().item() if same_shape else float("inf")
    yield Result("rollout.video_u8 (levels)", error, UINT8_BAR)
    last = io["video_last8"]
    yield Result("rollout.video_last8", relative_error(vae.video[:, :, -last.shape[2] :], last), PIXEL_BAR)


def rollout_config(golden: Golden, io: dict[str, Tensor]) -> ModelConfig:
    names = {"num_steps": "num_sampling_steps", "shift": "shift", "guidance_scale": "text_cfg_scale"}
    sampler = {names.get(key, key): value for key, value in golden.section("sampler").items()}
    height, width = io["image"].shape[-2:]
    return ModelConfig(
        name="golden",
        model_cfg=golden.transformer_config,
        vae_cfg=golden.vae_config,
        text_encoder_cfg=TextConfig(dim=golden.transformer_config.caption_channels),
        val_scheduler_cfg=from_dict(SamplerConfig, sampler, "config.json: sampler"),
        validation_data=RolloutConfig(num_frames=1 + FRAMES_PER_LATENT * (io["noise0"].shape[2] - 1)),
        buckets=((height, width),),
        negative_prompt=GivenText.NEGATIVE,
    )


def start(world: World, io: dict[str, Tensor]):
    """The session of the golden picture, which need not be one of 8 bits."""
    script = ActionScript.from_pairs(zip(io["move"].tolist(), io["view"].tolist(), strict=True))
    settings = FilmSettings.for_model(world.config, script, GivenText.POSITIVE)
    session = world.start(to_uint8(io["image"])[0], settings)
    history, state = world.vae.encode(io["image"])
    state = {name: tensor.cpu() for name, tensor in state.items()}
    return dataclasses.replace(session, history=history.cpu(), encoder_state=state)


class RecordedVAE:
    """A VAE that keeps the last latents and video it decoded, in full precision."""

    def __init__(self, vae: VideoVAE):
        self.encode = vae.encode
        self._decode = vae.decode

    def decode(self, latents: Tensor, **how) -> Tensor:
        self.latents, self.video = latents, self._decode(latents, **how)
        return self.video


class GivenText:
    """A text encoder that knows two texts, the rows of a tensor."""

    POSITIVE, NEGATIVE = "prompt", "negative prompt"

    def __init__(self, hidden: Tensor, mask: Tensor):
        self.hidden, self.mask = hidden, mask

    def encode(self, texts: list[str]) -> TextEmbedding:
        rows = [(self.POSITIVE, self.NEGATIVE).index(text) for text in texts]
        return TextEmbedding(self.hidden[rows], self.mask[rows])


def require(file: str, what: str, found: set[str], expected: set[str]) -> None:
    """Raises ValueError if tensors are missing or unknown."""
    problems = {"lacks": expected - found, "has the unknown": found - expected}
    texts = [f"{verb} {', '.join(sorted(names, key=natural))}" for verb, names in problems.items() if names]
    if texts:
        raise ValueError(f"{file}: {what} {' and '.join(texts)}")


def natural(name: str) -> list:
    """Sorting key: T5 before T17."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


CHECKS = {
    "vae_io": check_vae,
    "t5_io": check_text,
    "dit_io": check_transformer,
    "dit_io_bf16": check_transformer_bf16,
    "rollout": check_rollout,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of golden form, such as tests/golden")
    parser.add_argument("--device", default="cpu", help="where to compute; the bars are for the CPU")
    options = parser.parse_args(arguments)
    try:
        golden = Golden(options.folder, pick_device(options.device))
    except ValueError as error:
        parser.error(str(error))
    torch.backends.cudnn.allow_tf32 = False  # a GPU's convolutions would have 10 bits otherwise
    results, failures, left_out = [], [], ""
    for file, check in CHECKS.items():
        if file == "dit_io_bf16" and not (options.folder / f"{file}.safetensors").exists():
            left_out = f"; {file} is not in this folder and was not compared"
            continue
        try:
            with torch.inference_mode():
                for result in check(golden):
                    print(
                        f"{result.name:40} {result.error:9.2e} of {result.bar:.1e}{'' if result.passed else '  FAIL'}"
                    )
                    results.append(result)
        except (OSError, ValueError, RuntimeError) as error:
            print(f"{file:40} ERROR: {error}")
            failures.append(f"{file} ({error})")
    failures += [result.name for result in results if not result.passed]
    if failures:
        print(f"FAIL: {len(results)} tensors compared, {len(failures)} failures: {', '.join(failures)}{left_out}")
        return 1
    worst = max(results, key=lambda result: result.error / result.bar)
    share = worst.error / worst.bar
    print(f"PASS: {len(results)} tensors; the closest to its bar is {worst.name} at {share:.0%} of it{left_out}")
    return 0
