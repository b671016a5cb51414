"""Trains the tiny video VAE on frames from walks through procedural worlds and, if it is given some, photographs.

    infworld train vae --minutes 8 --out runs/vae
    torchrun --nproc-per-node N -m infworld.training.train_vae --minutes 8 --out runs/vae
    infworld train vae ... --resume runs/vae/resume.safetensors    # goes on where that run was stopped
    infworld train vae --size 192 256 --fold 4 --dim 40 --mult 1 2 3 --z-dim 48 --packs PACK ...
    infworld train vae ... --resume VAE --decoder-only --critic 0.8 --critic-from 0.1    # the same latents, sharper

Every report writes to the folder of `--out`: `vae.safetensors` (averaged weights in float16, for use: their latents
have mean 0 and deviation 1), `resume.safetensors`, `train.jsonl`, `train.png` and `samples-*.png` (truth above result).

Clips are short at first, because most of a picture is learned without motion; in the end they have the length of a
chunk, because an encoder that has only met clip starts, with zeros before them, does worse on what comes later. A
critic (`critic`) may judge the last part of the run, so that texture is kept in place of averaged away.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import infworld.vae
from infworld.checkpoint import read_metadata, read_tensors, save_tensors
from infworld.measures import psnr
from infworld.training.critic import Critic, critic_loss, judged_gradient
from infworld.training.data import first_seed
from infworld.training.equivariance import changed, shift_error
from infworld.training.frames import to_frames, to_video
from infworld.training.measures import raster, sharpness
from infworld.training.optim import EMA, GradientClipper, Muon, lr_at
from infworld.training.pictures import load_pictures
from infworld.training.run import Log, autocast, from_rank_0, leave_together, peak_gib, set_up_devices
from infworld.training.scenes import KIND_NAMES, KINDS, WALK_FRAMES, FramePool, measured_walks
from infworld.vae import ResidualBlock, VideoVAE

CLIPS_FROM = (0.0, 0.2, 0.6)  # shares of the schedule from which on clips have another length
AT_ONCE = 16  # walks encoded or decoded together
FILL = 0.15  # share of the run after which training starts, however few walks are there
GRADIENT, SQUARE, KL = 1.0, 10.0, 2e-4  # weights of the losses beside the absolute error
ROUGH = 8  # pixels a side
RAMP = 0.05  # share of the run in which the critic's say grows to the full one
CRITIC_LR = 3e-4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, type=Path)
    add("--minutes", required=True, type=float, help="length of this run, data included, final test not")
    add("--resume", type=Path, help="resume.safetensors of a stopped run; a finished one starts a new schedule")
    add("--size", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    add("--dim", type=int, default=16, help="channels of the VAE's finest level")
    add("--mult", type=int, nargs="+", default=(1, 2, 4, 4), help="channels of all levels over --dim")
    add("--fold", type=int, default=1, help="pixels a side that the VAE takes as one")
    add("--z-dim", type=int, default=16, help="channels of a latent")
    add("--packs", type=Path, nargs=2, metavar=("TRAINING", "KEPT"), help="pictures of training.collect")
    add(
        "--decoder-only", action="store_true", help="keep the encoder, and with it the latents, of --resume as they are"
    )
    add("--equivariant", type=float, default=0.0, help="share of steps with shifted or halved latents")
    add("--texture", type=float, default=0.0, help="weight of the error in how much texture there is, place by place")
    add("--critic", type=float, default=0.0, help="size of the critic's gradient over that of the other losses")
    add("--critic-from", type=float, default=0.6, help="share of the run after which the critic judges")
    add("--frames", type=int, default=162, help="frames per step and GPU")
    add("--clips", type=int, nargs=3, default=(5, 17, WALK_FRAMES), help="frames of a clip at first, later, in the end")
    add("--kinds", nargs="+", choices=KIND_NAMES, default=KINDS, help="of worlds with --packs, walked through in turn")
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
    identity = identity_vae(args.dim, args.mult, args.fold, args.z_dim)
    model = Autoencoder(identity, args.equivariant).to(device)
    done = load_weights(model.vae, args.resume) if args.resume else {"step": 0, "progress": 0.0}
    if args.decoder_only:
        if not args.resume:
            raise ValueError("--decoder-only keeps the encoder of a trained VAE: name one by --resume")
        model.freeze_encoder()
    ema = EMA(model.vae, args.ema)
    optimizers, clip = make_optimizers(model.vae, args.lr), GradientClipper()
    if args.compile:
        compile_norms()
    trained = DistributedDataParallel(model) if ranks > 1 else model
    critic = Critic().to(device)
    judge = DistributedDataParallel(critic, broadcast_buffers=False) if ranks > 1 else critic
    critic_optimizer = torch.optim.AdamW(critic.parameters(), CRITIC_LR, betas=(0.5, 0.9), weight_decay=0.0)

    # The data.
    seed = first_seed(args.seed, rank, ranks)
    pictures = load_pictures(args.packs[0]).to(device) if args.packs else None
    pool = FramePool(args.walks, args.size, seed, device, args.compile_render, pictures, args.kinds)
    pool.renew()  # compiles, if it is to
    filled_by = time.monotonic() + FILL * 60 * args.minutes
    while pool.filled < args.walks and time.monotonic() < filled_by:
        pool.renew()
    if log:
        unseen = measured_walks(args.unseen, args.size, device, args.packs, args.kinds)
        log.add("data", walks=pool.filled, ranks=ranks, device=str(device))

    def learn(frames: int, say: float) -> dict[str, Tensor]:
        """Gradients of one step on clips of that many frames; returns the losses. say: the critic's."""
        video = pool.clips(max(1, args.frames // frames), frames)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            decoded, video, mean, logvar = trained(video)
        losses = vae_losses(decoded.float(), video, mean.float(), logvar.float(), args.texture)
        beside = KL * losses["kl"]  # the part of the loss that does not depend on `decoded`
        if say:
            with autocast(device):
                false = critic(decoded).float()
                with torch.no_grad():
                    true = critic(video).float()
            judgement = critic_loss(false, true)
            gradient = judged_gradient(losses["loss"] - beside, judgement, decoded, say)
            others = [beside] if beside.requires_grad else []
            torch.autograd.backward([decoded, *others], [gradient, *[None] * len(others)])
            losses |= {"judgement": judgement, "critic": teach(decoded.detach(), video)}
        else:
            losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    def teach(decoded: Tensor, video: Tensor) -> Tensor:
        """One step of the critic; returns its loss."""
        critic_optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            true, false = judge(torch.cat([video, decoded.clamp(-1, 1)])).chunk(2)
        loss = critic_loss(true.float(), false.float())
        loss.backward()
        critic_optimizer.step()
        return loss

    # A rehearsal of every length of clip: what has to be compiled or tuned, or runs out of memory, does so now.
    for frames in sorted(set(args.clips)):
        learn(frames, args.critic)
        if log:
            log.add("rehearsal", frames=frames, gib=peak_gib(device))

    # The loop. The run's length is a time, so rank 0's clock decides for all.
    losses: list = []
    step, renewing = done["step"], 0.0
    started = last_report = time.monotonic()
    seconds = max(1.0, began + 60 * args.minutes - started)
    judged = False
    while True:
        now = time.monotonic()
        passed, lagging = from_rank_0(ranks, (now - started) / seconds, renewing < args.renew * (now - started))
        if passed >= 1:
            break
        progress = done["progress"] + (1 - done["progress"]) * passed
        frames = [clip for since, clip in zip(CLIPS_FROM, args.clips, strict=True) if progress >= since][-1]
        lr = args.lr * lr_at(progress, step - done["step"])
        say = args.critic * min(1.0, max(0.0, (progress - args.critic_from) / RAMP))
        if say and not judged:
            judged, losses = True, []  # from now on there are more of them
            if log:
                save_progress(model.vae, args.out, step, progress, "unjudged.safetensors")
        losses.append(learn(frames, say))
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
            few = {name: walks[:AT_ONCE] for name, walks in unseen.items()}
            quality = export(model.vae, ema, pool, few, args.out)
            save_progress(model.vae, args.out, step, progress)
            log.add("report", step=step, frames=frames, lr=lr, frames_per_second=rate, **means(losses), **quality)
            log.plot("minutes", [f"psnr_{name}" for name in unseen], ["loss"])
            losses, last_report = [], time.monotonic()

    # What is kept.
    if log:
        quality = export(model.vae, ema, pool, unseen, args.out)
        save_progress(model.vae, args.out, step, 1.0)
        vae = exported(model.vae, args.out).to(device)
        for name, walks in unseen.items():
            clips = to_video(walks[:AT_ONCE, :17])
            quality[f"shift_error_{name}"] = shift_error(lambda x: vae.encode(x)[0], clips, vae.space)
        log.add("done", step=step, worlds=pool.next_seed - seed, lost=clip.lost, gib=peak_gib(device), **quality)
    leave_together(ranks)


class Autoencoder(nn.Module):
    """The VAE behind one forward pass, with its latents' noise; starts with small residual branches.

    equivariant: in what share of the passes latents and video are shifted or halved before they are compared.
    """

    def __init__(self, vae: VideoVAE, equivariant: float = 0.0):
        super().__init__()
        self.vae, self.equivariant = vae, equivariant
        for block in self.vae.modules():
            if isinstance(block, ResidualBlock):
                block.residual["6"].weight.data *= 0.1

    def freeze_encoder(self) -> None:
        for part in (self.vae.encoder, self.vae.conv1):
            part.requires_grad_(False)

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is decoded, the video that it should be, and the latents' mean and log variance."""
        mean, logvar = self.vae.encode_distribution(video)
        logvar = logvar.clamp(-20, 10)
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        if torch.rand(()) < self.equivariant:
            z, video = changed(z, video, self.vae.space)
        return self.vae.decode_raw(z), video, mean, logvar


def identity_vae(dim: int, mult: Sequence[int] = (1, 2, 4, 4), fold: int = 1, z_dim: int = 16) -> VideoVAE:
    """A VAE whose latents are not normalised outside of its weights."""
    return VideoVAE(dim, z_dim, mult, latents_mean=(0.0,) * z_dim, latents_std=(1.0,) * z_dim, fold=fold)


def vae_losses(decoded: Tensor, video: Tensor, mean: Tensor, logvar: Tensor, texture: float = 0.0) -> dict[str, Tensor]:
    """The total under "loss", and its parts: absolute and squared error, error of the differences between neighbours in
    time, height and width, and divergence of the latents' distribution from the standard normal one.

    texture: weight of a further part, the error of `roughness`.
    """
    error = decoded - video
    parts = {
        "absolute": error.abs().mean(),
        "square": error.square().mean(),
        "gradient": sum(error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)) / 3,
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }
    total = parts["absolute"] + SQUARE * parts["square"] + GRADIENT * parts["gradient"] + KL * parts["kl"]
    if texture:
        parts["texture"] = (roughness(decoded) - roughness(video)).abs().mean()
        total = total + texture * parts["texture"]
    return {"loss": total, **parts}


def roughness(video: Tensor) -> Tensor:
    """How much neighbours differ from each other on average, in squares of `ROUGH` pixels: (N, 2, H / 8, W / 8).

    An average of possible textures has less of it than any of them, so where a picture can't be known to the pixel,
    this still asks for as much detail as there was.
    """
    frames = rearrange(video, "b c t h w -> (b t) c h w")
    steps = [F.pad(frames.diff(dim=-1), (0, 1)), F.pad(frames.diff(dim=-2), (0, 0, 0, 1))]
    return F.avg_pool2d(torch.stack([step.abs().mean(1) for step in steps], 1), ROUGH)


def compile_norms() -> None:
    """Fuses the VAE's norms."""
    torch._dynamo.config.recompile_limit = 64  # one variant for every width and layout
    infworld.vae.normalize = torch.compile(infworld.vae.normalize, dynamic=True)


def make_optimizers(vae: VideoVAE, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions' weights, AdamW for the rest."""
    learning = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if name.endswith("weight")]
    rest = [p for name, p in learning if not name.endswith("weight")]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr, betas=(0.9, 0.98), weight_decay=0.0)]


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def export(vae: VideoVAE, ema: EMA, pool: FramePool, unseen: dict[str, Tensor], out: Path) -> dict[str, float]:
    """Writes the averaged weights, normalised and in float16, and pictures of what the file makes of unseen walks.

    Returns for each kind of walks their PSNR in dB (mean over frames), that of the worst walk, that before folding and
    rounding, the sharpness over the truth's, and how far the mean and the standard deviation of any latent channel are
    from 0 and 1.
    """
    averaged = copy.deepcopy(vae)
    ema.copy_to(averaged)
    unfolded = {name: psnr(reconstruct(averaged, walks)[0], walks).mean() for name, walks in unseen.items()}
    if vae.conv1.weight.requires_grad:  # else the latents stay what they were
        seen = [encode(averaged, walks) for walks in pool.frames[:: max(1, pool.filled // 64)].split(AT_ONCE)]
        fold(averaged, *channel_statistics(torch.cat(seen)))
    save_tensors(out / "vae.safetensors", {name: tensor.half() for name, tensor in averaged.state_dict().items()})

    averaged = exported(vae, out)
    quality: dict = {}
    for name, walks in unseen.items():
        frames, latents = reconstruct(averaged, walks)
        save_pictures(out / f"samples-{name}.png", walks, frames)
        result = psnr(frames, walks)
        mean, std = channel_statistics(latents)
        quality |= {
            f"psnr_{name}": result.mean().item(),
            f"psnr_unfolded_{name}": unfolded[name].item(),
            f"psnr_worst_walk_{name}": result.mean(1).min().item(),
            f"sharpness_{name}": (sharpness(frames).mean() / sharpness(walks).mean()).item(),
            f"raster_{name}": torch.cat([raster(part) for part in frames.split(AT_ONCE)]).mean().item(),
            f"latent_mean_{name}": mean.abs().max().item(),
            f"latent_std_{name}": (std - 1).abs().max().item(),
        }
    return quality


def exported(vae: VideoVAE, out: Path) -> VideoVAE:
    """The VAE of the file that `export` wrote last."""
    averaged = copy.deepcopy(vae)
    averaged.load_state_dict(read_tensors(out / "vae.safetensors"))
    return averaged


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


def save_progress(vae: VideoVAE, out: Path, step: int, progress: float, name: str = "resume.safetensors") -> None:
    save_tensors(out / name, vae.state_dict(), {"step": str(step), "progress": str(progress)})


def means(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: torch.stack([loss[name] for loss in losses]).mean().item() for name in losses[0]}


def main(arguments: list[str] | None = None) -> None:
    train(parse_args(arguments))


if __name__ == "__main__":
    main()
