"""What stays on the GPU: the fastest plan whose estimated peak fits into the memory that is free.

Numbers only: a `World` applies a plan. docs/performance.md compares the estimates with measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from infworld.config import FRAMES_PER_LATENT, ModelConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.memory import MAX_SINGLE_PASS, memory_latents
from infworld.offload import SLOTS
from infworld.vae import VideoVAE

GB = 10**9
TEXTS = 2  # the prompt and, with guidance, what to avoid

# Activations that are alive at once, counted in the code and compared with traces of it (tests/test_small_cards.py).
COMPRESSOR_ACTIVATIONS = 5  # as wide as the hidden layers, of the longest pass
DECODER_CACHE, ENCODER_CACHE = 31, 25  # of the VAE, in frames of full size and of the first level's width
ROPES = 8  # tables of angles that `layers.rope_3d` keeps

WORKSPACE = GB // 2  # what cuBLAS and cuDNN take for themselves
USABLE = 0.9  # part of the memory that there is; the allocator loses some between tensors of many sizes


TOO_LITTLE = (
    "there is too little GPU memory for a chunk: close other programs that use the GPU, take a smaller picture or the "
    "CPU; what was filmed before is kept"
)


class NotEnoughMemory(RuntimeError):
    """A chunk does not fit even by the smallest plan. The film so far is kept."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where large tensors are kept while they are not used.

    blocks: of the transformer, "gpu" or "cpu". streams: of the memory, one per text, as `dit.KEEP` has it.
    """

    blocks: str = "gpu"
    streams: str = "gpu"

    def __str__(self) -> str:
        blocks = {"gpu": "the model on the GPU", "cpu": "the model's blocks in the CPU's memory"}
        streams = {"gpu": "on the GPU", "cpu": "in the CPU's memory", "recompute": "recomputed at each step"}
        return f"{blocks[self.blocks]}, memory streams {streams[self.streams]}"


# The fastest first. What is in the CPU's memory is copied to the GPU while it works, which costs little time.
PLANS = (
    MemoryPlan("gpu", "gpu"),
    MemoryPlan("gpu", "cpu"),
    MemoryPlan("gpu", "recompute"),
    MemoryPlan("cpu", "cpu"),
    MemoryPlan("cpu", "recompute"),
)
FASTEST = PLANS[0]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the parts of a film need, for the model's largest picture and longest memory."""

    block: int  # weights of one of the transformer's blocks
    layers: int
    rest: int  # the transformer's other weights, and the VAE's
    texts: int  # keys and values of all texts
    tokens: int  # a memory's tokens, as they enter one block
    step: int  # what a block works with, tables of angles included
    compressor: int
    frames: int  # the VAE with a chunk, both ways
    pinned_block: int  # a block, and a memory's tokens, in the CPU's memory
    pinned_tokens: int

    @staticmethod
    def of(config: ModelConfig, transformer: InfiniteWorldTransformer, vae: VideoVAE) -> MemoryEstimate:
        """The modules may be on `meta`; their dtypes count."""
        sizes, block = config.model_cfg, transformer.blocks[0]
        height, width = config.largest_bucket
        area = height * width // config.vae_cfg.space**2  # of a latent
        number = transformer.patch_embedding.weight.itemsize
        per_latent = area // sizes.patch**2 * sizes.dim * number
        noisy, memory = config.chunk_latents * per_latent, memory_latents(MAX_SINGLE_PASS) * per_latent
        angles = 4 * (noisy + memory) // number // sizes.num_heads
        weights = _bytes(block.parameters())
        text = config.text_encoder_cfg.model_max_length * sizes.dim * number
        window = MAX_SINGLE_PASS * area * sizes.memory_hidden_dim * number
        return MemoryEstimate(
            block=weights,
            layers=sizes.num_layers,
            rest=_bytes(transformer.parameters()) - weights * sizes.num_layers + _bytes(vae.parameters()),
            texts=TEXTS * sizes.num_layers * 2 * text,
            tokens=memory,
            step=_step(noisy, memory, sizes.ffn_dim / sizes.dim) + ROPES * angles,
            compressor=COMPRESSOR_ACTIVATIONS * window,
            frames=_frames(config, vae, height * width),
            pinned_block=sum(_pinned(parameter.nbytes) for parameter in block.parameters()),
            pinned_tokens=_pinned(memory),
        )

    def gpu(self, plan: MemoryPlan) -> int:
        """Peak bytes of GPU memory of a film."""
        weights = self.rest + self.block * (self.layers if plan.blocks == "gpu" else 0)
        slots = SLOTS * (self.block if plan.blocks == "cpu" else 0) * (2 if plan.streams == "recompute" else 1)
        streams = self.tokens * (TEXTS * self.layers if plan.streams == "gpu" else SLOTS)
        sampling = self.texts + streams + slots + self.step
        return weights + max(sampling, self.compressor, self.frames) + WORKSPACE

    def cpu(self, plan: MemoryPlan) -> int:
        """Bytes of pinned CPU memory that the plan needs."""
        blocks = self.layers * self.pinned_block if plan.blocks == "cpu" else 0
        return blocks + (TEXTS * self.layers * self.pinned_tokens if plan.streams == "cpu" else 0)


def choose(needs: MemoryEstimate, gpu: float, cpu: float, team: bool = False) -> MemoryPlan:
    """The fastest plan that fits into so many bytes of GPU and CPU memory; the smallest if none fits.

    team: whether several processes film together, which must all compute the same.
    """
    plans = _possible(needs, cpu, team)
    return next((plan for plan in plans if needs.gpu(plan) <= USABLE * gpu), min(plans, key=needs.gpu))


def next_smaller_plan(needs: MemoryEstimate, plan: MemoryPlan, cpu: float) -> MemoryPlan | None:
    """The next plan that needs less GPU memory, or None."""
    return next((other for other in _possible(needs, cpu, False) if needs.gpu(other) < needs.gpu(plan)), None)


def _possible(needs: MemoryEstimate, cpu: float, team: bool) -> list[MemoryPlan]:
    if team:
        return [plan for plan in PLANS if plan.streams != "recompute"]
    return [plan for plan in PLANS if needs.cpu(plan) <= USABLE * cpu or plan == FASTEST]


def _step(noisy: int, memory: int, widening: float) -> int:
    """A block's work on noisy tokens: the most is alive while keys are rotated, or in the feed-forward."""
    both = noisy + memory
    # The block's input, queries, the normalised tokens of both, their keys twice in their own dtype, twice in float32.
    rotating = 2 * noisy + 3 * both + 4 * both
    # The normalised tokens of both; input, queries, attention's result, three sums and norms; hidden before and after.
    feeding = both + 6 * noisy + int(2 * widening * noisy)
    return max(rotating, feeding)


def _frames(config: ModelConfig, vae: VideoVAE, pixels: int) -> int:
    """Decoding or encoding a chunk; at full size one latent goes through at a time, the first two together."""
    number = vae.conv1.weight.itemsize
    folded = pixels // vae.fold**2
    tile = vae.default_tile(torch.device("cuda"), folded)
    frames = min(1 + FRAMES_PER_LATENT * tile, config.chunk_frames + 1)
    frame, video = folded * config.vae_cfg.dim * number, pixels * 3 * config.chunk_frames
    decoding = frame * (4 * frames + 2 + DECODER_CACHE)
    encoding = frame * (4 * frames + 2 + ENCODER_CACHE) + video * (4 + number)
    return max(decoding, encoding)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _pinned(size: int) -> int:
    """Torch allocates pinned memory in powers of two."""
    return 1 << (size - 1).bit_length()
