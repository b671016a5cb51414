"""Trains the tiny world model: transformer, memory compressor, action encoder and byte text encoder together.

    torchrun --nproc-per-node N -m infworld.training.train_world --vae VAE --minutes 20 --out runs/a
    infworld train world ... --resume runs/a/state.pt           # goes on where the run stopped
    infworld train world ... --resume runs/a/world.safetensors  # from weights alone

Every sample is a chunk of a walk through a procedural world with the walk so far as history; chunks that come back to
what was lost sight of are drawn more often. Chunks have the lengths that the config names (`chunk_lengths`), and short
ones the memory of a live walk (`infworld.live`). Flow matching; a share of the samples is pure noise, where nothing but
the memory can tell what was there. Some histories fade, and in the later part of a run some are painted by the model
itself over the truth, so that long films of its own do not drift. The compressor starts as a near-identity that hands
key frames on, and is frozen for the first part: it would collapse before the transformer has learned to read it.
Whether the memory is read shows in the wrong-memory gap: the error given another world's memory over the error given
the right one, on unseen worlds. A run that loses it (1 = memory unused) has failed, however low its loss.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from infworld.checkpoint import read_tensors, save_tensors
from infworld.config import ModelConfig, SamplerConfig, load_config
from infworld.dit import InfiniteWorldTransformer
from infworld.live import REFRESH
from infworld.loading import load_vae
from infworld.memory import MAX_SINGLE_PASS, WINDOW, MemoryCompressor, window_starts
from infworld.sampler import MAX_TIMESTEP, sample, schedule
from infworld.text import ByteTextEncoder
from infworld.training import flow
from infworld.training.data import Batch, Cut, Labeller, WalkPool, first_seed, short_lengths
from infworld.training.flow import Conditions, memory_gap
from infworld.training.labels import jitter, label_actions, naive_labels, poses_to_matrices
from infworld.training.optim import EMA, GradientClipper, Muon
from infworld.training.pictures import load_pictures
from infworld.training.run import Log, autocast, compute_dtype, from_rank_0, leave_together, peak_gib, set_up_devices
from infworld.training.scenes import KIND_NAMES, KINDS
from infworld.training.walks import MIXED, VIEW_ONLY
from infworld.training.worlds import EVAL_SEEDS

MIXTURES = {
    "view": VIEW_ONLY,
    "half": {kind: VIEW_ONLY.get(kind, 0) / 2 + MIXED.get(kind, 0) / 2 for kind in {**VIEW_ONLY, **MIXED}},
    "mixed": MIXED,
}
LABELS = ("actions", "mixed", "poses", "naive")
NO_PROMPT = 0.3  # share of samples without their caption
FIRST_CHUNK = 0.3  # share of steps whose history is the picture alone: everyone's first film is such a chunk
HIERARCHICAL = 0.3  # share of steps with more than 80 latents of history, where walks are long enough
COMPRESSOR_LR = 0.1  # times the learning rate
WARMUP = 100  # steps
NOISES = 2  # noisy targets for every history: they share its way through compressor and transformer
PAINT_FROM = (2, 6)  # sampler steps, of 8, before which a painted chunk may start: the truth at noise 0.9 to 0.64
POSE_LABELS = 0.25  # share of walks whose actions are read off noisy poses, where labels are mixed
RENEWED_AT_ONCE = 16  # walks
UNSEEN_WALKS = 32
OWN_LENGTH = 0.5  # share of the chunks that have the model's own length, where it is to know short ones too
JUST_REFRESHED = 0.5  # share of the short chunks that could be, which begin off the grid with no recent latents
UNSEEN_CHUNKS = (2, 8)  # of history, where the memory is measured


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="tiny", help="model name or YAML")
    add("--vae", required=True, type=Path, help="trained VAE, .safetensors")
    add("--out", required=True, type=Path)
    add("--minutes", required=True, type=float, help="length of this run, data included")
    add("--resume", type=Path, help="state.pt of an earlier run, or its world.safetensors (text.safetensors beside it)")
    add("--pack", type=Path, help="pictures of training.collect, for textured worlds and photographs beside toy worlds")
    add("--kinds", nargs="+", choices=KIND_NAMES, default=KINDS, help="of worlds with --pack, walked through in turn")
    add("--mixture", choices=MIXTURES, default="mixed")
    add("--chunks", type=int, default=4, help="length of the walks; histories reach chunks - 1")
    add("--batch", type=int, default=128, help="noisy chunks per GPU and step")
    add("--walks", type=int, default=1024, help="kept on each GPU")
    add("--renew", type=float, default=0.2, help="share of the time spent on new walks")
    add("--paint", type=float, default=0.5, help="share of the run after which every other new history is painted")
    add("--fade", type=float, default=0.25, help="share of walks whose history is blurred and paled, the truth is not")
    add("--labels", choices=LABELS, default="actions", help="what was done, or what noisy poses show of it")
    add("--new-actions", action="store_true", help="train the action encoder anew, to compare labels")
    add("--lr", type=float, default=1e-3)
    add("--decay", type=float, default=0.2, help="last share of the run, in which the learning rate falls to 0")
    add("--unfreeze", type=float, default=0.55, help="share of the run after which the compressor learns")
    add("--ema", type=float, default=0.999)
    add("--report-every", type=float, default=30, help="seconds")
    add("--compile", action="store_true", help="compile blocks and renderer, for long runs: it starts slowly")
    add("--seed", type=int, default=0, help="which training worlds are met: another one for every run of a series")
    return parser.parse_args(argv)


def train(args: argparse.Namespace) -> None:
    began = time.monotonic()
    rank, ranks, device = set_up_devices()
    torch.manual_seed(args.seed * ranks + rank)
    log = Log(args.out, began) if rank == 0 else None
    config = load_config(args.config)

    # The models.
    vae = load_vae(config, device, compute_dtype(device), args.vae)
    model = Trainee(config).to(device)
    optimizers, clip = make_optimizers(model, args.lr), GradientClipper()
    ema = EMA(model, args.ema)
    done = resume(args.resume, model, optimizers, ema) if args.resume else {"step": 0, "samples": 0}
    if args.new_actions:
        renew_actions(model, ema)
    if args.compile:
        model.transformer.compile_blocks()
    trained = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model

    # The data.
    shared = {"vae": vae, "text": model.text, "config": config, "device": device, "compile": args.compile}
    seed = first_seed(args.seed, rank, ranks)
    pool = WalkPool(
        **shared,
        size=args.walks,
        chunks=args.chunks,
        mixture=MIXTURES[args.mixture],
        first_seed=seed,
        labeller=make_labeller(args.labels, seed),
        faded=args.fade,
        pictures=load_pictures(args.pack).to(device) if args.pack else None,
        kinds=args.kinds,
    )
    for _ in pool.kinds:  # of each kind, before the first step
        pool.renew(min(pool.size, RENEWED_AT_ONCE))
    if log:
        unseen = WalkPool(
            **shared,
            size=min(UNSEEN_WALKS, args.batch),
            chunks=min(1 + max(UNSEEN_CHUNKS), args.chunks),
            mixture=VIEW_ONLY,
            first_seed=EVAL_SEEDS[len(EVAL_SEEDS) // 2],
        )
        unseen.renew(unseen.size)
        log.add("ready", walks=pool.filled, ranks=ranks, **done)

    def renew(painted: bool) -> float:
        """New walks; returns the seconds they took."""
        count = min(pool.size, RENEWED_AT_ONCE)
        if not painted:
            return pool.renew(count)
        with averaged(model, ema), autocast(device):
            return pool.renew(count, lambda batch: paint(model, batch, config.val_scheduler_cfg))

    # The loop. The run's length is a time, so rank 0's clock decides for all.
    shift = config.val_scheduler_cfg.shift
    step, samples, losses, renewing, renewals = done["step"], done["samples"], [], 0.0, 0
    started = last_report = time.monotonic()
    while True:
        now = time.monotonic()
        lagging = renewing < args.renew * (now - started)
        progress, lagging = from_rank_0(ranks, (now - began) / (60 * args.minutes), lagging)
        if progress >= 1:
            break
        if lagging:  # all ranks at once, or they would wait for each other
            renewing += renew(painted=progress > args.paint and renewals % 2 == 0)
            renewals += 1
        warmup = min(1, (step - done["step"] + 1) / WARMUP)
        set_rates(optimizers, args.lr * warmup * min(1, (1 - progress) / max(args.decay, 1e-9)))
        rng = random.Random(args.seed * 1_000_003 + step)  # the same on all ranks
        chunk, cut = pick_chunk(args.chunks, config, rng), pick_cut(config, rng)
        batch = pool.batch(chunk, max(1, args.batch // NOISES), cut)
        drop_prompts(batch)
        with autocast(device):
            loss = flow_loss(trained, batch, shift, frozen=progress < args.unfreeze)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip(model.parameters())
        for optimizer in optimizers:
            optimizer.step()
        ema.update()
        losses.append(loss.detach())
        step, samples = step + 1, samples + NOISES * len(batch.history) * ranks
        if log and now - last_report > args.report_every:
            rate = (samples - done["samples"]) / (now - started)
            report(log, model, ema, unseen, args.out, step, samples, losses, clip.lost)
            spent = {"renewed": pool.next_seed - seed, "renewing": renewing, "peak_gib": peak_gib(device)}
            log.add("rate", samples_per_second=rate, **spent)
            losses, last_report = [], now

    # What is kept: the averaged weights for use, the whole state to go on from.
    if log:
        report(log, model, ema, unseen, args.out, step, samples, losses, clip.lost)
        state = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step, "samples": samples}
        torch.save({**state, "optimizers": [o.state_dict() for o in optimizers]}, args.out / "state.pt")
        log.plot("samples", ["loss", "error_right", "error_wrong"], ["gap", "far_gap"], scale="log")
    leave_together(ranks)


class Trainee(nn.Module):
    """All that learns together, behind one forward pass."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.transformer = InfiniteWorldTransformer(config.model_cfg)
        self.text = ByteTextEncoder(config.text_encoder_cfg)
        initialize(self.transformer)

    def forward(
        self, noisy: Tensor, timestep: Tensor, batch: Batch, *, frozen: bool = False, wrong_memory: bool = False
    ) -> Tensor:
        """Velocity of `noisy` (n B, C, 21, h, w) at `timestep` (n B,) in 0..1000: n for each of the batch's B samples,
        side by side.

        frozen: the compressor gets no gradient. wrong_memory: every sample gets the compressed memory of its
        neighbour in the batch, and its own last latent.
        """
        noises = len(noisy) // len(batch.history)
        given = self.condition(batch, frozen, wrong_memory).repeated(noises)
        return self.transformer.denoise(noisy, timestep, given.stream, given.actions, given.context)

    def condition(self, batch: Batch, frozen: bool = False, wrong_memory: bool = False) -> Conditions:
        """What a batch's velocities depend on besides the noise: memory, actions and text."""
        # cuDNN's attention has wrong gradients under a mask of 64 tokens (pytorch issue 196678).
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            text = self.text(batch.ids, batch.mask)
        known = batch.history[:, :, : batch.history.shape[2] - batch.recent]
        actions, swapped = (batch.move, batch.view), {"frozen": frozen, "wrong_memory": wrong_memory}
        given = flow.condition(self.transformer, known, *actions, text, batch.mask, **swapped)
        stream = given.stream
        if batch.recent:  # as a live walk adds them, chunk by chunk
            for latents in batch.history[:, :, known.shape[2] :].split(batch.target.shape[2] - 1, dim=2):
                stream = self.transformer.extend_memory(stream, latents, given.context)
        return Conditions(stream, given.actions, given.context)


def flow_loss(model: nn.Module, batch: Batch, shift: float, frozen: bool) -> Tensor:
    """`flow.loss` of a batch, every sample with `NOISES` noises."""
    return flow.loss(lambda z, timestep: model(z, timestep, batch, frozen=frozen), batch.target, shift, NOISES)


def drop_prompts(batch: Batch) -> None:
    """Makes some of the prompts empty."""
    drop = torch.rand(len(batch.mask), 1, device=batch.mask.device) < NO_PROMPT
    empty = (torch.arange(batch.mask.shape[1], device=batch.mask.device) == 0).long()  # the start token alone
    batch.mask = torch.where(drop, empty, batch.mask)


@torch.no_grad()
def paint(model: Trainee, batch: Batch, sampler: SamplerConfig) -> Tensor:
    """The batch's targets (B, C, 21, h, w) noised to a random level and denoised again: the truth in the model's hand.

    What the model could not know stays as it was, since some of it shows through the noise.
    """
    timesteps = schedule(sampler, sampler.num_sampling_steps)
    timesteps = timesteps[int(torch.randint(*PAINT_FROM, ())) * sampler.num_sampling_steps // 8 :]
    t = timesteps[0].item() / MAX_TIMESTEP
    given = model.condition(batch)

    def velocity(z: Tensor, timestep: Tensor) -> Tensor:
        return model.transformer.denoise(z, timestep.expand(len(z)), given.stream, given.actions, given.context)

    return sample(velocity, (1 - t) * batch.target + t * torch.randn_like(batch.target), timesteps)


@torch.compiler.set_stance("force_eager")  # few calls, whose graphs without gradients would take minutes to compile
def memory_report(model: Trainee, unseen: WalkPool) -> dict[str, float]:
    """`memory_errors` with a short history, their ratio with a long one as `far_gap`, and as `short_gap` that of the
    shortest chunks in the middle of two refreshments of their memory, if there are short ones."""
    histories = [chunks for chunks in UNSEEN_CHUNKS if chunks < unseen.chunks] or [unseen.chunks - 1]
    errors = [memory_errors(model, unseen, chunks) for chunks in histories]
    report = errors[0] | {"far_gap": errors[-1]["gap"]}
    if unseen.shorts:
        middle = unseen.places[len(unseen.places) // 2]
        cut = Cut(middle, unseen.shorts[0], middle)
        report["short_gap"] = memory_errors(model, unseen, histories[0], cut)["gap"]
    return report


@torch.no_grad()
def memory_errors(model: Trainee, unseen: WalkPool, chunks: int, cut: Cut | None = None) -> dict[str, float]:
    """On unseen worlds, at pure noise, over the last quarter of the chunk after `chunks` chunks: the error with the
    right memory, with another world's, and their ratio; with the compressor's spread across worlds and its correlation
    with key frames."""
    device = unseen.device
    index = torch.arange(unseen.size, device=device)
    batch = unseen.select(index, torch.zeros_like(index), chunks, cut)
    noise = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0)).to(device)
    with autocast(device):
        errors = memory_gap(lambda wrong: partial(model, batch=batch, wrong_memory=wrong), batch.target, noise)
        compressed = model.transformer.latent_encoder.compress(batch.history).float()
    keys = batch.history[:, :, key_latents(batch.history.shape[2])]
    correlation = torch.corrcoef(torch.stack((compressed.flatten(), keys.flatten())))[0, 1]
    return {
        **errors,
        "memory_std_across_worlds": compressed.std(dim=0).mean().item(),
        "memory_key_frame_correlation": correlation.item(),
    }


def key_latents(count: int) -> list[int]:
    """Which latents of a history of `count` a compressor that only picks would hand on."""
    starts = window_starts(count)
    if len(starts) == 1:
        return list(range(0, count, 4))
    return [start + i for start in starts for i in range(0, WINDOW, 4)][::4]


def report(
    log: Log,
    model: Trainee,
    ema: EMA,
    unseen: WalkPool,
    out: Path,
    step: int,
    samples: int,
    losses: list[Tensor],
    lost_steps: int,
) -> None:
    """Logs the loss and the averaged weights' memory errors, and saves those weights for use."""
    with averaged(model, ema):
        errors = memory_report(model, unseen)
        save_weights(out, model)
    finite = [loss for loss in torch.stack(losses).tolist() if math.isfinite(loss)] if losses else []
    loss = sum(finite) / len(finite) if finite else None
    log.add("report", step=step, samples=samples, loss=loss, lost_steps=lost_steps, **errors)


@contextmanager
def averaged(model: nn.Module, ema: EMA):
    """The model with its averaged weights, and its own again afterwards."""
    own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    ema.copy_to(model)
    try:
        yield
    finally:
        model.load_state_dict(own)


def make_labeller(labels: str, seed: int) -> Labeller | None:
    """What tells a walk's actions: "actions" what was done, "poses" and "naive" labels of noisy poses with and without
    *uncertain* between the thresholds, "mixed" of some walks the first and of some the second."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)

    def label(poses: Tensor, done: Tensor) -> Tensor:
        if labels == "mixed" and rng.random() > POSE_LABELS:
            return done
        noisy = jitter(poses_to_matrices(poses.double()), generator)
        return torch.stack(naive_labels(noisy) if labels == "naive" else label_actions(noisy))

    return None if labels == "actions" else label


def renew_actions(model: Trainee, ema: EMA) -> None:
    """Forgets the action encoder, in the average as well."""
    device = next(model.parameters()).device
    fresh = Trainee(model.config).transformer.action_encoder.state_dict()
    model.transformer.action_encoder.load_state_dict(fresh)
    for name, tensor in fresh.items():
        ema.average[f"transformer.action_encoder.{name}"].copy_(tensor.to(device))


def resume(path: Path, model: Trainee, optimizers: list, ema: EMA) -> dict[str, int]:
    """Goes on from a whole state (.pt) or from exported weights (.safetensors); returns the steps and samples done."""
    if path.suffix == ".pt":
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return {"step": state["step"], "samples": state["samples"]}
    load_weights(path, model)
    ema.begin()
    return {"step": 0, "samples": 0}


def save_weights(folder: Path, model: Trainee) -> None:
    """Writes world.safetensors and text.safetensors, in half precision."""
    for part, name in ((model.transformer, "world"), (model.text, "text")):
        halves = {key: tensor.half() for key, tensor in part.state_dict().items()}
        save_tensors(folder / f"{name}.safetensors", halves)


def load_weights(path: Path, model: Trainee) -> None:
    """Takes up world.safetensors, and text.safetensors beside it."""
    model.transformer.load_state_dict(read_tensors(path))
    model.text.load_state_dict(read_tensors(path.with_name("text.safetensors")))


def initialize(model: InfiniteWorldTransformer) -> None:
    """Weights to train from: small residual branches with open gates, a silent head, a compressor of key frames."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.startswith("latent_encoder"):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    depth = (2 * len(model.blocks)) ** 0.5
    for block in model.blocks:
        nn.init.normal_(block.modulation, std=0.02)
        for layer in (block.self_attn.o, block.cross_attn.o, block.ffn[2]):
            layer.weight.data /= depth
    nn.init.zeros_(model.time_projection[1].weight)
    gates = model.time_projection[1].bias.data.view(6, -1)
    gates[2] = gates[5] = 1
    nn.init.normal_(model.head.modulation, std=0.02)
    nn.init.zeros_(model.head.head.weight)
    for embedding in (model.action_encoder.embedding_move, model.action_encoder.embedding_view):
        nn.init.normal_(embedding.weight, std=0.5)
    initialize_compressor(model.latent_encoder)


def initialize_compressor(compressor: MemoryCompressor) -> None:
    """A near-identity that hands on every fourth latent of its input.

    Each latent channel travels as a pair of opposite signs, so that the last SiLU loses nothing (silu(x) - silu(-x) =
    x); the time convolutions take the centre frame; all else starts near zero.
    """
    channels = compressor.conv_in.in_channels
    for name, parameter in compressor.named_parameters():
        if parameter.ndim > 1:
            parameter.data *= 0.02 if name.endswith(("conv2.weight", "attn.o.weight")) else 0.05
        elif name.endswith("bias"):
            parameter.data.zero_()
    into, out = compressor.conv_in.weight.data, compressor.conv_out.weight.data
    for channel in range(channels):
        into[2 * channel : 2 * channel + 2] = 0
        into[2 * channel, channel, 1, 1, 1] = 1
        into[2 * channel + 1, channel, 1, 1, 1] = -1
        out[channel] = 0
        out[channel, 2 * channel, 1, 1, 1] = 1
        out[channel, 2 * channel + 1, 1, 1, 1] = -1
    for down in (compressor.down_block1[2], compressor.down_block2[2]):
        down.conv.weight.data[:, :, 1, 1, 1] += torch.eye(down.conv.out_channels)


def make_optimizers(model: Trainee, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest; the compressor apart, at a tenth of the rate."""
    blocks = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    compressor = list(model.transformer.latent_encoder.parameters())
    apart = {id(p) for p in blocks + compressor}
    rest = [p for p in model.parameters() if id(p) not in apart]
    groups = [{"params": rest, "factor": 1.0}, {"params": compressor, "factor": COMPRESSOR_LR}]
    return [Muon(blocks, lr), torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def set_rates(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)


def pick_chunk(chunks: int, config: ModelConfig, rng: random.Random) -> int:
    """The chunk that a step trains: 0 now and then, mostly those with up to 80 latents of history, some beyond."""
    single_pass = max(1, min(chunks, MAX_SINGLE_PASS // (config.chunk_latents - 1)))
    draw = rng.random()
    if draw < FIRST_CHUNK or chunks == 1:
        return 0
    if chunks > single_pass and (draw < FIRST_CHUNK + HIERARCHICAL or single_pass == 1):
        return rng.randrange(single_pass, chunks)
    return rng.randrange(1, single_pass)


def pick_cut(config: ModelConfig, rng: random.Random) -> Cut | None:
    """A short chunk of a length that the model is to know, all equally likely, or None for its own.

    As live play cuts them whose memory is refreshed on the grid of the model's own chunks, and now and then such as
    begin elsewhere with a memory just refreshed: of histories of at most 80 latents the compressor meets twice as many
    lengths as without short chunks, no more.
    """
    shorts = short_lengths(config)
    if not shorts or rng.random() < OWN_LENGTH:
        return None
    new = rng.choice(shorts)
    place = rng.randrange(0, min(REFRESH, config.chunk_latents - 2) + 1, new)
    just_refreshed = place == shorts[-1] and rng.random() < JUST_REFRESHED
    return Cut(place, new, 0 if just_refreshed else place)


def main(arguments: list[str] | None = None) -> None:
    train(parse_args(arguments))


if __name__ == "__main__":
    main()
