"""Begins a model with the blocks of a trained one: their VAEs differ, their tokens show the same parts of a picture.

    infworld train transplant --config infworld/configs/tiny2.yaml --pack pack.zip --out runs/start
    infworld train world --config infworld/configs/tiny2.yaml --resume runs/start/world.safetensors ...

What is shared is copied. The patch embedding and the head go through linear maps between the tokens of both VAEs, found
by ridge regression on frames of worlds that training never draws. Of a wider feed-forward layer, the units with the
largest weights stay. The compressor, which works on latents, begins as in a run from nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from infworld.config import ModelConfig, load_config
from infworld.loading import load_vae
from infworld.models import prepare
from infworld.training.frames import to_video
from infworld.training.pictures import Pictures, load_pictures
from infworld.training.run import compute_dtype
from infworld.training.scenes import KINDS, draw_scenes
from infworld.training.train_world import Trainee, load_weights, save_weights
from infworld.training.walks import MIXED, sample_actions
from infworld.training.worlds import EVAL_SEEDS
from infworld.vae import VideoVAE

RIDGE = 0.1  # added to the variance of each coordinate
NEW_DIRECTIONS = 0.02  # standard deviation of what lets through in tokens what the old ones do not show
FRAMES = 33  # of a walk
APART = 1_000_003  # between the seeds of two kinds, beyond those that evaluation draws

LinearMap = tuple[Tensor, Tensor]  # (in, out) and (out,): tokens (N, in) -> (N, out)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    old, new = prepare(args.source), load_config(args.config)
    pictures = load_pictures(args.pack).to(device) if args.pack else None
    old_tokens, new_tokens = draw_tokens(old, new, pictures, args.walks, device)
    to_old, to_new = fit(new_tokens, old_tokens), fit(old_tokens, new_tokens)
    print(f"{len(old_tokens)} tokens; R2 of old from new {r_squared(to_old, new_tokens, old_tokens):.2f}")
    model = Trainee(new)
    transplant(model, load_source(old), to_old, to_new)
    args.out.mkdir(parents=True, exist_ok=True)
    save_weights(args.out, model)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--source", default="tiny", help="the trained model: its name, or a YAML file; default: tiny")
    add("--config", required=True, help="YAML file of the new model, whose VAE is trained")
    add("--pack", type=Path, help="pictures of training.collect, for textured worlds and photographs beside toy worlds")
    add("--walks", type=int, default=4, help="of each kind of world; default: 4")
    add("--out", type=Path, required=True, help="folder for world.safetensors and text.safetensors")
    return parser.parse_args(arguments)


def load_source(config: ModelConfig) -> Trainee:
    source = Trainee(config)
    load_weights(config.path(config.checkpoint_path), source)
    return source


def transplant(model: Trainee, source: Trainee, to_old: LinearMap, to_new: LinearMap) -> None:
    """Makes the new model compute what the source does, seen through the maps between their tokens.

    to_old: new tokens -> old ones, (channel, row, column) flattened, as `tokens_of` has them; to_new: back. Raises
    ValueError where the two are too different: other widths, depths, heads or patches.
    """
    old, new = source.config.model_cfg, model.config.model_cfg
    for name in ("dim", "num_layers", "num_heads", "freq_dim", "patch", "caption_channels"):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"model_cfg.{name} is {getattr(new, name)}, and {getattr(old, name)} in the source")
    if new.ffn_dim > old.ffn_dim:
        raise ValueError(f"model_cfg.ffn_dim is {new.ffn_dim}, more than the source's {old.ffn_dim}")
    there = model.transformer.state_dict()
    for name, tensor in source.transformer.state_dict().items():
        if not name.startswith("latent_encoder") and there[name].shape == tensor.shape:
            there[name].copy_(tensor)
    for block, trained in zip(model.transformer.blocks, source.transformer.blocks, strict=True):
        copy_largest_units(block.ffn, trained.ffn, new.ffn_dim)
    embed_through(model, source, to_old)
    predict_through(model, source, to_new)
    model.text.load_state_dict(source.text.state_dict())


@torch.no_grad()
def copy_largest_units(into: torch.nn.Sequential, trained: torch.nn.Sequential, count: int) -> None:
    """The hidden units by the product of the norms of what leads to them and away from them."""
    first, _, last = trained
    largest = (first.weight.norm(dim=1) * last.weight.norm(dim=0)).topk(count).indices.sort().values
    into[0].weight.copy_(first.weight[largest])
    into[0].bias.copy_(first.bias[largest])
    into[2].weight.copy_(last.weight[:, largest])
    into[2].bias.copy_(last.bias)


@torch.no_grad()
def embed_through(model: Trainee, source: Trainee, to_old: LinearMap) -> None:
    """The patch embedding after the map to old tokens; the channels of the mask of memory are as they were."""
    layer, trained = model.transformer.patch_embedding, source.transformer.patch_embedding
    weight, shift = to_old
    channels, patch = model.config.model_cfg.out_channels, model.config.model_cfg.patch
    old = trained.weight[:, : source.config.model_cfg.out_channels].flatten(1)
    own = (old @ weight.T).unflatten(1, (channels, 1, patch, patch))
    layer.weight[:, :channels] = own + NEW_DIRECTIONS * torch.randn_like(own)
    layer.weight[:, channels:] = trained.weight[:, source.config.model_cfg.out_channels :]
    layer.bias.copy_(trained.bias + old @ shift)


@torch.no_grad()
def predict_through(model: Trainee, source: Trainee, to_new: LinearMap) -> None:
    """The head followed by the map to new tokens. A velocity is noise less picture, so the map's shift comes off."""
    layer, trained = model.transformer.head.head, source.transformer.head.head
    (weight, shift), patch = to_new, model.config.model_cfg.patch

    def as_tokens(x: Tensor) -> Tensor:
        return rearrange(x, "(p q c) ... -> (c p q) ...", p=patch, q=patch)

    def as_head(x: Tensor) -> Tensor:
        return rearrange(x, "(c p q) ... -> (p q c) ...", p=patch, q=patch)

    layer.weight.copy_(as_head(weight.T @ as_tokens(trained.weight)))
    layer.bias.copy_(as_head(weight.T @ as_tokens(trained.bias) - shift))


@torch.no_grad()
def draw_tokens(
    old: ModelConfig, new: ModelConfig, pictures: Pictures | None, walks: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Tokens (N, C p q) of both VAEs for the same parts of the same frames. Raises ValueError where a picture has more
    tokens in one model than in the other."""
    grids = [tuple(side // config.token_pixels for side in config.buckets[0]) for config in (old, new)]
    if grids[0] != grids[1]:
        raise ValueError(f"a picture has {grids[1]} tokens, and {grids[0]} in the source")
    vaes = [load_vae(config, device, compute_dtype(device)) for config in (old, new)]
    generator, found = torch.Generator().manual_seed(0), []
    for number, kind in enumerate(dict.fromkeys(KINDS) if pictures else ("toy",)):
        move, view = torch.stack(sample_actions(MIXED, walks, FRAMES + 1, generator), 1)[:, :, :-1].unbind(1)
        first = EVAL_SEEDS.stop + number * APART
        scenes = draw_scenes(kind, range(first, first + walks), move, view, pictures, generator)
        for walk in range(walks):
            frames = scenes.render(slice(walk, walk + 1), new.buckets[0], device)[:, :FRAMES]
            found.append([tokens_of(vae, frames, config) for vae, config in zip(vaes, (old, new), strict=True)])
    old_tokens, new_tokens = zip(*found, strict=True)
    return torch.cat(old_tokens).cpu(), torch.cat(new_tokens).cpu()


def tokens_of(vae: VideoVAE, frames: Tensor, config: ModelConfig) -> Tensor:
    """Frames (B, T, H, W, 3) uint8, scaled to the model's size -> tokens (N, C p q) float32."""
    video = to_video(frames, torch.float32)
    video = F.interpolate(video, size=(video.shape[2], *config.buckets[0]), mode="area")
    latents, _ = vae.encode(video.to(vae.conv1.weight.dtype))
    patch = config.model_cfg.patch
    return rearrange(latents.float(), "b c t (h p) (w q) -> (b t h w) (c p q)", p=patch, q=patch)


def fit(x: Tensor, y: Tensor, ridge: float = RIDGE) -> LinearMap:
    """Ridge regression of y (N, out) on x (N, in), whose variances are around 1."""
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    penalty = torch.full((x.shape[1],), ridge * len(x), dtype=x.dtype)
    penalty[-1] = 0
    solved = torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ y.double()).float()
    return solved[:-1], solved[-1]


def r_squared(mapped: LinearMap, x: Tensor, y: Tensor) -> float:
    rest = y - x @ mapped[0] - mapped[1]
    return 1 - (rest.var(dim=0).sum() / y.var(dim=0).sum()).item()


if __name__ == "__main__":
    main()
