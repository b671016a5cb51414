"""Writes the released weights in a form that loads in seconds: safetensors, in the dtype that they are used in.

infworld convert

The three files appear beside the released ones, under `checkpoints/`, where every program prefers them without
being told; the released ones may then be deleted. With `--out FOLDER` they go elsewhere, with tokenizer and a config
that names them: `--model FOLDER/infworld_config.yaml`. Either way nothing is held in memory: tensors are read from the
mapped file and written piece by piece.

Transformer and text encoder become bfloat16, which is what a GPU computes with in any case, so the film is the same; on
a CPU, where the transformer computes in float32, its weights are rounded. The VAE keeps its float32: it is small, and
the dtype that it computes in (bfloat16 on a GPU) is chosen when it is loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import yaml
from torch import Tensor
from tqdm import tqdm

from infworld import hub
from infworld.checkpoint import RELEASED_EXTRAS, TORCH_SUFFIXES, check_fit, read_tensors, save_tensors, shapes_of
from infworld.cli.console import exit_code
from infworld.config import ModelConfig, load_config, to_dict
from infworld.dit import InfiniteWorldTransformer
from infworld.text import umt5_shapes
from infworld.transfer import check_room
from infworld.vae import build_vae


@dataclass(frozen=True)
class Conversion:
    """One file: where it goes, what is in it, and what its floating-point tensors become."""

    target: Path
    tensors: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes that the tensors will take."""
        return sum(
            tensor.numel() * (self.dtype if tensor.is_floating_point() else tensor.dtype).itemsize
            for tensor in self.tensors.values()
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="infinite-world", help="the model to convert, or the path of its YAML file")
    parser.add_argument("--out", type=Path, help="folder to write to (default: beside the released files)")
    parser.add_argument("--overwrite", action="store_true", help="replace converted files that are there")
    args = parser.parse_args(arguments)
    return exit_code(
        lambda: convert(load_config(args.model), args.out, args.overwrite),
        "stopped: files that are named above are whole, of the others there is nothing",
    )


def convert(config: ModelConfig, out: Path | None = None, overwrite: bool = False) -> None:
    """Converts the three files; with `out`, writes tokenizer and config too.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit the config or is converted
    already, for files that are there and no `overwrite`, and for a disk without room. Then nothing has been written.
    """
    if config.text_encoder_cfg.type != "umt5":
        raise ValueError(f"the model {config.name!r} has nothing to convert: its files are small")
    conversions = plan(config, out)
    there = [str(job.target) for job in conversions if job.target.exists()]
    if there and not overwrite:
        raise ValueError(f"{', '.join(there)}: there already; use --overwrite to replace")
    for folder in {job.target.parent for job in conversions}:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    check_room(conversions[0].target.parent, sum(job.size for job in conversions))
    with tqdm(total=sum(job.size for job in conversions), unit="B", unit_scale=True, unit_divisor=1000) as bar:
        for job in conversions:
            bar.set_description_str(job.target.name)
            save_tensors(job.target, job.tensors, {"format": "pt"}, dtype=job.dtype, progress=bar.update)
            bar.write(f"{job.target} ({job.size / 1e9:.2f} GB)")
    if out:
        copy_tokenizer(config, out)
        settings = out / "infworld_config.yaml"
        settings.write_text(settings_text(config), encoding="utf-8")
        print(f"use it with: --model {settings}")
    else:
        print("it is used from now on; the files it was made from may be deleted")


def plan(config: ModelConfig, out: Path | None) -> list[Conversion]:
    """What becomes of each file; all of them are opened and compared with the model, none is read yet."""
    with torch.device("meta"):
        transformer, vae = InfiniteWorldTransformer(config.model_cfg), build_vae(config.vae_cfg)
    parts = [
        (shapes_of(transformer), torch.bfloat16),
        (shapes_of(vae), torch.float32),
        (umt5_shapes(config.text_encoder_cfg), torch.bfloat16),
    ]
    found = weight_names(hub.find(config) or config)
    conversions = []
    for name, place, (shapes, dtype) in zip(weight_names(config), found, parts, strict=True):
        if Path(name).suffix not in TORCH_SUFFIXES:
            raise ValueError(f"{name} is no torch file ({', '.join(TORCH_SUFFIXES)}): it is converted already")
        source = config.path(place).with_suffix(Path(name).suffix)  # though the converted one beside it is preferred
        tensors = {key: tensor for key, tensor in read_tensors(source).items() if key not in RELEASED_EXTRAS}
        check_fit(shapes, tensors, source)
        target = (out / short_name(name) if out else source).with_suffix(".safetensors")
        conversions.append(Conversion(target, tensors, dtype))
    return conversions


def weight_names(config: ModelConfig) -> tuple[str, str, str]:
    return config.checkpoint_path, config.vae_cfg.vae_pth, config.text_encoder_cfg.checkpoint_path


def short_name(name: str) -> Path:
    """A config's file below the folder written to: without `checkpoints/`, or all folders of an absolute path."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return Path(path.name)
    return path.relative_to("checkpoints") if path.parts[0] == "checkpoints" else path


def remove_leftovers(folder: Path) -> None:
    """Unfinished files of conversions that were killed."""
    for part in folder.glob(".*.safetensors.*.part"):
        if not psutil.pid_exists(int(part.name.split(".")[-2])):
            part.unlink()


def copy_tokenizer(config: ModelConfig, out: Path) -> None:
    name = config.text_encoder_cfg.tokenizer_path
    found = hub.find(config) or config
    source, target = found.path(found.text_encoder_cfg.tokenizer_path), out / short_name(name)
    if source.resolve() != target.resolve():
        shutil.copytree(source, target, dirs_exist_ok=True)


def settings_text(config: ModelConfig) -> str:
    """The config with the new names, relative to its own folder."""

    def converted(name: str) -> str:
        return short_name(name).with_suffix(".safetensors").as_posix()

    text = config.text_encoder_cfg
    text = dataclasses.replace(
        text,
        checkpoint_path=converted(text.checkpoint_path),
        tokenizer_path=short_name(text.tokenizer_path).as_posix(),
    )
    config = dataclasses.replace(
        config,
        checkpoint_path=converted(config.checkpoint_path),
        vae_cfg=dataclasses.replace(config.vae_cfg, vae_pth=converted(config.vae_cfg.vae_pth)),
        text_encoder_cfg=text,
    )
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
