"""Trains the tiny video VAE on frames from walks through procedural worlds.

    infworld train vae --minutes 8 --out runs/vae
    torchrun --nproc-per-node N -m training.train_vae --minutes 8 --out runs/vae
    infworld train vae ... --resume runs/vae/resume.safetensors    # goes on where that run was stopped

Every report writes to the folder of `--out`: `vae.safetensors` (averaged weights in float16, for use: their latents
have mean 0 and deviation 1), `resume.safetensors`, `train.jsonl`, `train.png` and `samples.png` (truth above result).

Clips are short at first, because most of a picture is learned without motion; in the end they have the length of a
chunk, because an encoder that has only met clip starts, with zeros before them, does worse on what comes later.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import infworld.vae
from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.measures import psnr
from infworld.training.data import first_seed, to_frames, to_video
from infworld.training.optim import EMA, GradientClipper, Muon, lr_at
from infworld.training.render import render
from infworld.training.run import Log, autocast, finish, from_rank_0, peak_gib, set_up_devices
from infworld.training.walks import MIXED, sample_actions
from infworld.training.worlds import EVAL_SEEDS, make_worlds, spawn, walk
from infworld.vae import ResidualBlock, VideoVAE

WALK_FRAMES = 81
CLIP_FRAMES = {0.0: 5, 0.4: 17, 0.8: WALK_FRAMES}  # share of the schedule from which on -> frames of a clip
RENEWED = 64  # walks rendered together
AT_ONCE = 16  # walks encoded or decoded together
FILL = 0.15  # share of the run after which training starts, however few walks are there
GRADIENT, SQUARE, KL = 1.0, 10.0, 2e-4  # weights of the losses beside the absolute error


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, type=Path)
    add("--minutes", required=True, type=float, help="length of this run, data included, final test not")
    add("--resume", type=Path, help="resume.safetensors of a stopped run; a finished one starts a new schedule")
    add("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    add("--dim", type=int, default=16)
    add("--frames", type=int, default=162, help="frames per step and GPU, in clips of 5, then 17, then 81")
    add("--walks", type=int, default=1024, help="kept on each GPU, 81 frames each")
    add("--renew", type=float, default=0.15, help="share of the time spent on new walks")
    add("--unseen", type=int, default=64, help="walks of the final test; reports test the first 16")
    add("--lr", type=float, default=3e-3)
    add("--ema", type=float, default=0.999)
    add("--report-every", type=float, default=30, help="seconds")
    add("--compile", action="store_true", help="fuse the norms")
    add("--compile-render", action="store_true", help="compile the renderer, for long runs: it starts slowly")
    add("--seed", type=int, default=0, help="which training worlds are met: another one for every run of a series")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    began = time.monotonic()
    rank, ranks, device = set_up_devices()
    torch.manual_seed(args.seed * ranks + rank)
    log = Log(args.out, began) if rank == 0 else None

    # The model. Its latents stay raw while it trains; the export folds their mean and deviation into the weights.
    model = Autoencoder(args.dim).to(device)
    done = load_weights(model.vae, args.resume) if args.resume else {"step": 0, "progress": 0.0}
    ema = EMA(model.vae, args.ema)
    optimizers, clip = make_optimizers(model.vae, args.lr), GradientClipper()
    if args.compile:
        compile_norms()
    trained = DistributedDataParallel(model) if ranks > 1 else model

    # The data.
    seed = first_seed(args.seed, rank, ranks)
    pool = FramePool(args.walks, args.size, seed, device, args.compile_render)
    pool.renew()  # compiles, if it is to
    filled_by = time.monotonic() + FILL * 60 * args.minutes
    while pool.filled < args.walks and time.monotonic() < filled_by:
        pool.renew()
    if log:
        unseen = FramePool(args.unseen, args.size, EVAL_SEEDS[0], device, args.compile_render)
        while unseen.filled < args.unseen:
            unseen.renew()
        log.add("data", walks=pool.filled, ranks=ranks, device=str(device))

    def learn(frames: int) -> dict[str, Tensor]:
        """Gradients of one step on clips of that many frames; returns the losses."""
        video = pool.clips(max(1, args.frames // frames), frames)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            decoded, mean, logvar = trained(video)
        losses = vae_losses(decoded.float(), video, mean.float(), logvar.float())
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    # A rehearsal of every length of clip: what has to be compiled or tuned, or runs out of memory, does so now.
    for frames in CLIP_FRAMES.values():
        learn(frames)
        if log:
            log.add("rehearsal", frames=frames, gib=peak_gib(device))

    # The loop. The run's length is a time, so rank 0's clock decides for all.
    step, losses, renewing = done["step"], [], 0.0
    started = last_report = time.monotonic()
    seconds = max(1.0, began + 60 * args.minutes - started)
    while True:
        now = time.monotonic()
        passed, lagging = from_rank_0(ranks, (now - started) / seconds, renewing < args.renew * (now - started))
        if passed >= 1:
            break
        progress = done["progress"] + (1 - done["progress"]) * passed
        frames = next(frames for since, frames in reversed(CLIP_FRAMES.items()) if progress >= since)
        lr = args.lr * lr_at(progress, step - done["step"])
        losses.append(learn(frames))
        clip(model.parameters())
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        ema.update()
        step += 1
        if lagging:  # all ranks at once, or they would wait for each other
            renewing += pool.renew()
        if log and (step - done["step"] == 10 or now - last_report > args.report_every):
            rate = (step - done["step"]) * args.frames * ranks / (now - started)
            quality = export(model.vae, ema, pool, unseen.frames[:AT_ONCE], args.out)
            save_progress(model.vae, args.out, step, progress)
            log.add("report", step=step, frames=frames, lr=lr, frames_per_second=rate, **means(losses), **quality)
            log.plot("minutes", ["psnr"], ["loss"])
            losses, last_report = [], time.monotonic()

    # What is kept.
    if log:
        quality = export(model.vae, ema, pool, unseen.frames, args.out)
        save_progress(model.vae, args.out, step, 1.0)
        log.add("done", step=step, worlds=pool.next_seed - seed, **quality)
    if ranks > 1:
        dist.destroy_process_group()


class Autoencoder(nn.Module):
    """The VAE behind one forward pass, with its latents' noise; starts with small residual branches."""

    def __init__(self, dim: int):
        super().__init__()
        self.vae = identity_vae(dim)
        for block in self.vae.modules():
            if isinstance(block, ResidualBlock):
                block.residual["6"].weight.data *= 0.1

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.vae.encode_distribution(video)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        return self.vae.decode_raw(z), mean, logvar


def identity_vae(dim: int) -> VideoVAE:
    """A VAE whose latents are not normalised outside of its weights."""
    return VideoVAE(dim, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)


def vae_losses(decoded: Tensor, video: Tensor, mean: Tensor, logvar: Tensor) -> dict[str, Tensor]:
    """The total under "loss", and its parts: absolute and squared error, error of the differences between neighbours in
    time, height and width, and divergence of the latents' distribution from the standard normal one."""
    error = decoded - video
    parts = {
        "absolute": error.abs().mean(),
        "square": error.square().mean(),
        "gradient": sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)) / 3,
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }
    total = parts["absolute"] + SQUARE * parts["square"] + GRADIENT * parts["gradient"] + KL * parts["kl"]
    return {"loss": total, **parts}


def compile_norms() -> None:
    """Fuses the VAE's norms."""
    torch._dynamo.config.recompile_limit = 64  # one variant for every width and layout
    infworld.vae.normalize = torch.compile(infworld.vae.normalize, dynamic=True)


def make_optimizers(vae: VideoVAE, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions' weights, AdamW for the rest."""
    matrices = [p for name, p in vae.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in vae.named_parameters() if not name.endswith("weight")]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


class FramePool:
    """Up to `size` rendered walks, (size, 81, H, W, 3) uint8 on `device`, of worlds `first_seed`, + 1, ..."""

    def __init__(self, size: int, picture: tuple[int, int], first_seed: int, device: torch.device, compile: bool):
        self.size, self.picture, self.device, self.compile = size, tuple(picture), device, compile
        self.storage = torch.zeros(size, WALK_FRAMES, *self.picture, 3, dtype=torch.uint8, device=device)
        self.next_seed, self.filled, self.oldest = first_seed, 0, 0
        self.generator = torch.Generator().manual_seed(first_seed)

    @property
    def frames(self) -> Tensor:
        """The walks that are there, (filled, 81, H, W, 3) uint8."""
        return self.storage[: self.filled]

    @torch.no_grad()
    def renew(self) -> float:
        """Adds some walks, in place of the oldest once the pool is full; returns the seconds it took."""
        finish(self.device)
        began = time.monotonic()
        count = min(RENEWED, self.size)
        worlds = make_worlds(range(self.next_seed, self.next_seed + count))
        # Poses are made on the CPU, where their many small steps start faster.
        poses = walk(worlds, spawn(worlds), *sample_actions(MIXED, count, WALK_FRAMES - 1, self.generator))
        frames = render(worlds.to(self.device), poses.to(self.device), *self.picture, compile=self.compile)
        slots = torch.arange(self.oldest, self.oldest + count) % self.size
        self.storage[slots.to(self.device)] = frames
        self.next_seed += count
        self.filled = min(self.size, max(self.filled, self.oldest + count))
        self.oldest = (self.oldest + count) % self.size
        finish(self.device)
        return time.monotonic() - began

    def clips(self, count: int, frames: int) -> Tensor:
        """Random clips as video, (count, 3, frames, H, W) in [-1, 1]."""
        walks = torch.randint(self.filled, (count, 1), device=self.device)
        first = torch.randint(WALK_FRAMES - frames + 1, (count, 1), device=self.device)
        return to_video(self.storage[walks, first + torch.arange(frames, device=self.device)])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def export(vae: VideoVAE, ema: EMA, pool: FramePool, unseen: Tensor, out: Path) -> dict[str, float]:
    """Writes the averaged weights, normalised and in float16, and pictures of what the file makes of unseen walks.

    Returns their PSNR in dB (mean over frames), that before folding and rounding, that of the worst walk, and how far
    the mean and the standard deviation of any latent channel on unseen walks are from 0 and 1.
    """
    averaged = identity_vae(vae.dim).to(unseen.device)
    ema.copy_to(averaged)
    unfolded = psnr(reconstruct(averaged, unseen)[0], unseen).mean()
    seen = [encode(averaged, walks) for walks in pool.frames[:256].split(AT_ONCE)]
    fold(averaged, *channel_statistics(torch.cat(seen)))
    save_tensors(out / "vae.safetensors", {name: tensor.half() for name, tensor in averaged.state_dict().items()})

    averaged.load_state_dict(read_tensors(out / "vae.safetensors"))
    frames, latents = reconstruct(averaged, unseen)
    save_pictures(out / "samples.png", unseen, frames)
    quality = psnr(frames, unseen)
    mean, std = channel_statistics(latents)
    return {
        "psnr": quality.mean().item(),
        "psnr_unfolded": unfolded.item(),
        "psnr_worst_walk": quality.mean(1).min().item(),
        "latent_mean": mean.abs().max().item(),
        "latent_std": (std - 1).abs().max().item(),
    }


def save_pictures(path: Path, truth: Tensor, frames: Tensor) -> None:
    """Every 16th frame of the first four walks from left to right, the truth above the result."""
    pairs = torch.stack([truth[:4, ::16], frames[:4, ::16]], dim=1)  # walk, row, column, H, W, 3
    Image.fromarray(pairs.transpose(2, 3).flatten(0, 2).flatten(1, 2).cpu().numpy()).save(path)


def encode(vae: VideoVAE, frames: Tensor) -> Tensor:
    return vae.encode(to_video(frames))[0]


def reconstruct(vae: VideoVAE, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Frames (B, 81, H, W, 3) uint8 through the VAE: such frames again, and the latents in between."""
    latents = torch.cat([encode(vae, part) for part in frames.split(AT_ONCE)])
    decoded = [to_frames(vae.decode(part)) for part in latents.split(AT_ONCE)]
    return torch.cat(decoded), latents


def channel_statistics(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of latents (B C T h w)."""
    channels = latents.double().movedim(1, 0).flatten(1)
    return channels.mean(1).float(), channels.std(1).float()


@torch.no_grad()
def fold(vae: VideoVAE, mean: Tensor, std: Tensor) -> None:
    """Changes the weights so that latents z become (z - mean) / std and are decoded to the same video."""
    into, out, scale = vae.conv1, vae.conv2, std.view(-1, 1, 1, 1, 1)
    into.weight[: vae.z_dim] /= scale
    into.bias[: vae.z_dim] = (into.bias[: vae.z_dim] - mean) / std
    into.bias[vae.z_dim :] -= 2 * std.log()
    out.bias += out.weight.flatten(1) @ mean
    out.weight *= scale.movedim(0, 1)


def load_weights(vae: VideoVAE, path: Path) -> dict[str, float]:
    """Takes up weights; returns the steps done and the share of the schedule done, 0 for a finished run."""
    vae.load_state_dict(read_tensors(path))
    metadata = read_metadata(path)
    return {"step": int(metadata.get("step", 0)), "progress": float(metadata.get("progress", 0)) % 1}


def save_progress(vae: VideoVAE, out: Path, step: int, progress: float) -> None:
    save_tensors(out / "resume.safetensors", vae.state_dict(), {"step": str(step), "progress": str(progress)})


def means(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: torch.stack([loss[name] for loss in losses]).mean().item() for name in losses[0]}


def main(arguments: list[str] | None = None) -> None:
    train(parse_args(arguments))


if __name__ == "__main__":
    main()
