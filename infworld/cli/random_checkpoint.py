"""Writes random weights in files of the released names, formats, shapes and dtypes, to test speed and memory with.

infworld random-checkpoint DIR
infworld generate --model DIR/infworld_config.yaml --image PICTURE --out film.mp4

DIR is laid out like `checkpoints/`: the transformer (float32, under `state_dict`, with the two extra keys), the VAE
(float32) and umT5 (bfloat16, 11.4 GB) as torch files, a tokenizer of a few hundred pieces, and a config. 17.7 GB in
all; as much memory as the largest file is needed. The film is noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from infworld.checkpoint import RELEASED_EXTRAS, shapes_of
from infworld.cli.console import exit_code
from infworld.config import ModelConfig, load_config, to_dict
from infworld.dit import InfiniteWorldTransformer
from infworld.text import umt5_shapes
from infworld.transfer import check_room
from infworld.vae import build_vae

TRANSFORMER, VAE = "infinite_world_model.ckpt", "models/Wan2.1_VAE.pth"
TEXT, TOKENIZER = "models/models_t5_umt5-xxl-enc-bf16.pth", "models/google/umt5-xxl"
SETTINGS = "infworld_config.yaml"
NOISE = 16_777_259  # random numbers that are made; a prime, so that the rows of no matrix repeat
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"()-/"

Shapes = Mapping[str, torch.Size]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--config", default="infinite-world", help="YAML file of another model's sizes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    args = parser.parse_args(arguments)

    def run() -> None:
        settings = make(args.out, load_config(args.config), args.seed, args.overwrite)
        print(f"use it with: --model {settings}")

    return exit_code(run, "stopped: files that are named above are whole")


def make(out: Path, config: ModelConfig, seed: int = 0, overwrite: bool = False) -> Path:
    """Writes all files below `out`; returns the config's path.

    Raises ValueError for a text encoder that is not umT5, files that are there and no `overwrite`, too small a disk.
    """
    text = config.text_encoder_cfg
    if text.type != "umt5":
        raise ValueError(f"text_encoder_cfg.type must be umt5, as the released one's is, not {text.type!r}")
    if (out / SETTINGS).exists() and not overwrite:
        raise ValueError(f"{out / SETTINGS} is there already: use --overwrite to replace all files")
    files = weight_files(config)
    out.mkdir(parents=True, exist_ok=True)
    check_room(
        out, sum(shape.numel() * dtype.itemsize for shapes, dtype in files.values() for shape in shapes.values())
    )
    noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(seed))
    for name, (shapes, dtype) in files.items():
        began = time.monotonic()
        tensors = random_tensors(shapes, noise.to(dtype))
        write(out / name, {"state_dict": tensors | extras(config)} if name == TRANSFORMER else tensors)
        size = (out / name).stat().st_size
        print(f"{out / name}: {len(shapes)} tensors, {size / 1e9:.2f} GB, {time.monotonic() - began:.1f} s")
        del tensors
    make_tokenizer(out / TOKENIZER, text.vocab)
    (out / SETTINGS).write_text(settings_text(config), encoding="utf-8")
    return out / SETTINGS


def weight_files(config: ModelConfig) -> dict[str, tuple[Shapes, torch.dtype]]:
    """By file: what is in it, and in which dtype."""
    with torch.device("meta"):
        transformer, vae = InfiniteWorldTransformer(config.model_cfg), build_vae(config.vae_cfg)
    return {
        TRANSFORMER: (shapes_of(transformer), torch.float32),
        VAE: (shapes_of(vae), torch.float32),
        TEXT: (umt5_shapes(config.text_encoder_cfg), torch.bfloat16),
    }


def random_tensors(shapes: Shapes, noise: Tensor) -> dict[str, Tensor]:
    """Tensors through which numbers neither grow nor vanish: normal, divided by the root of how many are summed.

    Norms are one, biases zero. Each tensor takes up the noise, round and round, where the last one left it.
    """
    tensors, start = {}, 0
    for name, shape in shapes.items():
        if is_norm(name, shape):
            tensors[name] = torch.ones(shape, dtype=noise.dtype)
        elif len(shape) == 1:
            tensors[name] = torch.zeros(shape, dtype=noise.dtype)
        else:
            tensors[name] = taken(noise, start, shape, scale=shape[1:].numel() ** -0.5)
            start = (start + shape.numel()) % len(noise)
    return tensors


def is_norm(name: str, shape: torch.Size) -> bool:
    return name.endswith(".gamma") or (len(shape) == 1 and name.endswith(".weight"))


def taken(noise: Tensor, start: int, shape: torch.Size, scale: float) -> Tensor:
    """A new tensor filled with `scale` times the noise from `start` on, from its beginning again at its end."""
    flat = torch.empty(shape.numel(), dtype=noise.dtype)
    done = 0
    while done < len(flat):
        piece = noise[start : start + len(flat) - done]
        torch.mul(piece, scale, out=flat[done : done + len(piece)])
        done, start = done + len(piece), 0
    return flat.reshape(shape)


def extras(config: ModelConfig) -> dict[str, Tensor]:
    """What the released file has besides the model's tensors; their content is never looked at."""
    return {name: torch.zeros(1, 1, config.model_cfg.dim) for name in RELEASED_EXTRAS}


def write(path: Path, content: dict) -> None:
    """A torch file, whole or not at all; without checksums, which torch never reads and which take most of the time."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, part)
        os.replace(part, path)
    finally:
        torch.serialization.set_crc32_options(checksums)
        if part.exists():
            part.unlink()


def make_tokenizer(folder: Path, vocab: int) -> None:
    """A folder that AutoTokenizer loads: letters, syllables of two, and the special pieces where umT5 has them."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces(vocab), unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def pieces(vocab: int) -> list[tuple[str, float]]:
    """Pieces of text with their log probabilities, at most `vocab`."""
    letters: Iterable[str] = ["▁", *LETTERS]
    pairs = [first + second for first in LETTERS[:26] for second in LETTERS[:26]]
    texts = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    texts += [(letter, -5.0) for letter in letters] + [(pair, -7.0) for pair in pairs]
    return texts[:vocab]


def settings_text(config: ModelConfig) -> str:
    """The config with the names of these files, and a name of its own: a film of noise is not the model's."""
    config = dataclasses.replace(
        config,
        name=f"{config.name}-random",
        checkpoint_path=TRANSFORMER,
        vae_cfg=dataclasses.replace(config.vae_cfg, vae_pth=VAE),
        text_encoder_cfg=dataclasses.replace(config.text_encoder_cfg, checkpoint_path=TEXT, tokenizer_path=TOKENIZER),
    )
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
