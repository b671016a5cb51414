"""Causal video VAE: between video (B 3 T H W in [-1, 1]) and latents (B z_dim T' H/space W/space), spec section 4.

The first frame makes the first latent, every four further frames one more. All time padding is on the left, so a clip
can be continued: each pass hands on the last frames that the temporal layers saw, the feature cache, as an explicit
`state`. Between two calls the large entries, of the encoder's layers that see every frame, are left out: they are
recomputed from the clip's last 19 frames, which are a nineteenth of their size. Inside this file frames lie as B T H W
C, the memory order in which convolutions, norms and attention are fastest. A VAE
with `fold` above 1 sees squares of that many pixels a side as the channels of one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infworld.config import FRAMES_PER_LATENT, RELEASED_LATENTS_MEAN, RELEASED_LATENTS_STD, VAEConfig
from infworld.fused import fused

FRAMES = "frames"  # name of a clip's last frames in an encoder's state
OLD_STATE_FRAMES = 20  # that must follow an older state, so that the next one has all frames it needs

# Numbers in one full-resolution activation of one pass; some ten such activations are alive at once.
# A CPU is fastest near its caches; a GPU wants large passes, but the transformer shares its memory.
PASS_SIZE_CPU = 2**21
PASS_SIZE_GPU = 2**28


class PictureShard(Protocol):
    """Some rows of a picture (B T H W C) whose other rows are on other devices; all devices call these methods
    together."""

    def with_neighbours(self, x: Tensor) -> Tensor:
        """x with one more row above and below: the neighbours', or zeros at the picture's edges."""

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The rows of all devices; `dim` is the axis of the rows."""


class VideoVAE(nn.Module):
    """Encoder and decoder with the released tensor names.

    `latents_mean` and `latents_std`, one number per latent channel, normalise the latents. They are plain numbers and
    not buffers, so that neither a build on the meta device nor a cast of the weights touches them. `fold`: pixels a
    side of the squares that the network takes as one. `space`, pixels a side of a latent, is 8 for the released sizes.
    """

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        latents_mean: Sequence[float] = RELEASED_LATENTS_MEAN,
        latents_std: Sequence[float] = RELEASED_LATENTS_STD,
        fold: int = 1,
    ):
        super().__init__()
        if not len(latents_mean) == len(latents_std) == z_dim:
            raise ValueError(
                f"latents_mean and latents_std have {len(latents_mean)} and {len(latents_std)} numbers; "
                f"z_dim is {z_dim}, so {z_dim} of each are needed"
            )
        self.dim, self.z_dim, self.fold = dim, z_dim, fold
        self.space = fold * 2 ** (len(dim_mult) - 1)
        self.latents_mean, self.latents_std = tuple(latents_mean), tuple(latents_std)
        widths = [dim * mult for mult in dim_mult]
        self.encoder = Encoder(3 * fold**2, widths, 2 * z_dim, num_res_blocks)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(widths, z_dim, 3 * fold**2, num_res_blocks + 1)

    def encode(
        self,
        video: Tensor,
        state: dict[str, Tensor] | None = None,
        tile: int | None = None,
        shard: PictureShard | None = None,
        *,
        whole: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encodes a clip, or further frames of the clip whose `state` an earlier call returned.

        video: B 3 T H W in [-1, 1], H and W multiples of `space`; T = 1 + 4n without `state`, 4n with it.
        tile: latents per pass, which never changes the result; by default bounded by memory. shard: for pictures whose
        rows are split over devices; then video, state and results are this one's rows. whole: the state returned has
        the large entries too (`reduced` takes them out), which saves a short continuation a third of its time.
        Returns the normalised mean latents, B z_dim T' H/space W/space with T' = 1 + n or n, in the dtype of `video`,
        and the state to continue with: named tensors in the dtype of the weights, detached. A state may come from a VAE
        of another dtype or device, or be an earlier version's, which held the whole cache.
        Raises ValueError for any other shape and for a state of another batch or picture size.
        """
        self._check_video(video, state)
        x = self._fold(video).to(self.conv1.weight.dtype)
        tile = tile or self.default_tile(x.device, x[0, 0, ..., 0].numel() * len(x))
        carried = {name: tensor.to(x) for name, tensor in (state or {}).items()}
        seen = carried.pop(FRAMES, x[:, :0])
        if seen.shape[1] and _cache_key(0) not in carried:
            carried |= self.encoder.full_rate_features(seen, shard)
        means = []
        for part in _split(x, first=0 if state else 1, size=tile * FRAMES_PER_LATENT):
            cache = FeatureCache(carried, shard=shard)
            mean, _ = _pointwise(self.encoder(part, cache), self.conv1).chunk(2, dim=-1)
            means.append(mean)
            carried = cache.state
        mean = torch.cat(means, dim=1).to(video.dtype)
        mean = (mean - mean.new_tensor(self.latents_mean)) / mean.new_tensor(self.latents_std)
        carried[FRAMES] = self.encoder.last_frames(torch.cat([seen, x], dim=1))
        return mean.movedim(-1, 1).contiguous(), carried if whole else self.reduced(carried)

    def reduced(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state without what can be recomputed from the frames that it has."""
        left_out = set(map(_cache_key, range(self.encoder.full_rate_convolutions())))
        return {name: tensor for name, tensor in state.items() if name not in left_out}

    def decode(self, latents: Tensor, tile: int | None = None, shard: PictureShard | None = None) -> Tensor:
        """Decodes a whole clip of normalised latents, B z_dim T' h w.

        tile, shard: as for `encode`.
        Returns video, B 3 T H W with T = 1 + 4(T' - 1) and H, W `space` times h, w, in [-1, 1] and in the dtype of
        `latents`.
        Raises ValueError for another number of dimensions or channels and for no latents.
        """
        _check_latents(latents, self.z_dim)
        z = latents.movedim(1, -1)
        z = z * z.new_tensor(self.latents_std) + z.new_tensor(self.latents_mean)
        z = _pointwise(z.to(self.conv2.weight.dtype), self.conv2)
        folded = z[0, 0, ..., 0].numel() * len(z) * (self.space // self.fold) ** 2
        tile = tile or self.default_tile(z.device, folded)
        state, video = None, []
        for part in _split(z, first=1, size=tile):
            cache = FeatureCache(state, shard=shard)
            video.append(self.decoder(part, cache).clamp(-1, 1))
            state = cache.state
        return self._unfold(torch.cat(video, dim=1).to(latents.dtype)).contiguous()

    def encode_distribution(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the raw, not normalised latents of a whole clip, in one pass; for training.

        video and errors as in `encode` without state. Returns two tensors B z_dim T' H/space W/space.
        """
        self._check_video(video, None)
        x = self.encoder(self._fold(video), FeatureCache(keep=False))
        mean, logvar = _pointwise(x, self.conv1).movedim(-1, 1).chunk(2, dim=1)
        return mean, logvar

    def decode_raw(self, z: Tensor) -> Tensor:
        """Video, not clamped, of a whole clip of raw, not normalised latents, in one pass; for training.

        Shapes and errors as in `decode`.
        """
        _check_latents(z, self.z_dim)
        return self._unfold(self.decoder(_pointwise(z.movedim(1, -1), self.conv2), FeatureCache(keep=False)))

    def default_tile(self, device: torch.device, pixels: int) -> int:
        """Latents per pass for pictures of `pixels` (folded) pixels, all pictures of a batch together."""
        pass_size = PASS_SIZE_CPU if device.type == "cpu" else PASS_SIZE_GPU
        return max(1, pass_size // (self.dim * pixels * FRAMES_PER_LATENT))

    def _fold(self, video: Tensor) -> Tensor:
        """B 3 T H W -> B T H/fold W/fold C."""
        return rearrange(video, "b c t (h p) (w q) -> b t h w (c p q)", p=self.fold, q=self.fold)

    def _unfold(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t h w (c p q) -> b c t (h p) (w q)", p=self.fold, q=self.fold)

    def _check_video(self, video: Tensor, state: dict[str, Tensor] | None) -> None:
        if video.dim() != 5 or video.shape[1] != 3:
            raise ValueError(f"video must be B 3 T H W, got {tuple(video.shape)}")
        batch, _, frames, height, width = video.shape
        if height % self.space or width % self.space or not height * width:
            raise ValueError(f"video of {height}x{width}: crop height and width to multiples of {self.space}")
        if state is None:
            if frames % FRAMES_PER_LATENT != 1:
                raise ValueError(f"a clip has 1 + {FRAMES_PER_LATENT}n frames, got {frames}")
            return
        if frames % FRAMES_PER_LATENT or not frames:
            raise ValueError(f"a clip is continued by {FRAMES_PER_LATENT}n frames, got {frames}")
        seen = state.get(FRAMES, state.get(_cache_key(0)))
        folded = (height // self.fold, width // self.fold, 3 * self.fold**2)
        if seen is None or seen.dim() != 5 or seen.shape[:1] + seen.shape[2:] != (batch, *folded):
            shape = "nothing" if seen is None else tuple(seen.shape)
            raise ValueError(f"state is of {shape}, not of a clip of batch {batch} and size {height}x{width}")
        if FRAMES not in state and frames < OLD_STATE_FRAMES:
            raise ValueError(
                f"a state of an earlier version is continued by {OLD_STATE_FRAMES} frames or more, not {frames}"
            )


def build_vae(config: VAEConfig) -> VideoVAE:
    """The VAE of a config, untrained."""
    sizes = {k: v for k, v in asdict(config).items() if k != "vae_pth"}
    return VideoVAE(**sizes)


class Encoder(nn.Module):
    """B T H W in_dim -> B T' h w out_dim. Space shrinks after each level but the last, time after the two before it."""

    def __init__(self, in_dim: int, widths: Sequence[int], out_dim: int, blocks: int):
        super().__init__()
        self.conv1 = CausalConv3d(in_dim, widths[0], 3)
        self.downsamples = nn.ModuleList()
        last = len(widths) - 1
        width = widths[0]
        for level, level_width in enumerate(widths):
            for _ in range(blocks):
                self.downsamples.append(ResidualBlock(width, level_width))
                width = level_width
            if level < last:
                self.downsamples.append(Downsample(width, temporal=level >= last - 2))
        self.middle = nn.ModuleList([ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)])
        self.head = nn.ModuleDict({"0": Norm(width), "2": CausalConv3d(width, out_dim, 3)})
        halved = next(i for i, layer in enumerate(self.downsamples) if getattr(layer, "time_conv", None) is not None)
        self._full_rate = 1 + halved  # layers that see every frame: conv1 and those before time is first halved

    def forward(self, x: Tensor, cache: "FeatureCache") -> Tensor:
        for layer in self._layers():
            x = layer(x, cache)
        norm, conv = self.head.values()
        return conv(norm(x), cache)

    def last_frames(self, frames: Tensor) -> Tensor:
        """Of frames (B T H W C), those from which `full_rate_features` can recompute its features."""
        return frames[:, -(1 + 2 * self.full_rate_convolutions()) :].detach().clone()

    def full_rate_features(self, frames: Tensor, shard: PictureShard | None = None) -> dict[str, Tensor]:
        """The cache that `state` left out, recomputed from the frames that it kept.

        Each convolution consumes two frames, and one is left at the end. Fewer frames are a clip from its beginning.
        """
        whole = frames.shape[1] < 1 + 2 * self.full_rate_convolutions()
        cache = FeatureCache(padded=whole, shard=shard)
        for layer in self._layers()[: self._full_rate]:
            frames = layer(frames, cache)
        return cache.state

    def _layers(self) -> list[nn.Module]:
        return [self.conv1, *self.downsamples, *self.middle]

    def full_rate_convolutions(self) -> int:
        layers = self._layers()[: self._full_rate]
        return sum(isinstance(module, CausalConv3d) for layer in layers for module in layer.modules())


class Decoder(nn.Module):
    """B T' h w in_dim -> B T H W out_dim. Space grows after each level but the last, time after the first two."""

    def __init__(self, widths: Sequence[int], in_dim: int, out_dim: int, blocks: int):
        super().__init__()
        last, width = len(widths) - 1, widths[-1]
        self.conv1 = CausalConv3d(in_dim, width, 3)
        self.middle = nn.ModuleList([ResidualBlock(width, width), Attention(width), ResidualBlock(width, width)])
        self.upsamples = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks):
                self.upsamples.append(ResidualBlock(width, widths[level]))
                width = widths[level]
            if level > 0:
                self.upsamples.append(Upsample(width, temporal=level > last - 2))
                width //= 2
        self.head = nn.ModuleDict({"0": Norm(width), "2": CausalConv3d(width, out_dim, 3)})

    def forward(self, x: Tensor, cache: "FeatureCache") -> Tensor:
        x = self.conv1(x, cache)
        for layer in (*self.middle, *self.upsamples):
            x = layer(x, cache)
        norm, conv = self.head.values()
        return conv(norm(x), cache)


class FeatureCache:
    """What the temporal layers carry from one pass to the next: their last input frames, in the order of the layers.

    `state`: the last pass's `FeatureCache.state`, or None at the start of a clip; each entry is removed when its
    layer has read it, to free memory. keep: whether another pass will follow.
    padded: without a state, whether zeros stand before the first frame, as at a clip's start; else frames
    without two predecessors are dropped. shard: where other devices have the picture's other rows.
    """

    def __init__(
        self,
        state: dict[str, Tensor] | None = None,
        keep: bool = True,
        padded: bool = True,
        shard: PictureShard | None = None,
    ):
        self.at_start = not state
        self.padded = padded
        self.shard = shard
        self.state: dict[str, Tensor] = {}
        self._past = state or {}
        self._keep = keep
        self._layer = 0

    def swap(self, x: Tensor, frames: int) -> Tensor | None:
        """Replaces the last pass's frames by the last `frames` frames of this pass's x (B T H W C).

        Returns the latter, None at the start of a clip, where zeros stand in if x is too short.
        """
        name = _cache_key(self._layer)
        self._layer += 1
        past = self._past.pop(name, None)
        if self._keep:
            missing = frames - x.shape[1]
            if missing > 0:
                x = torch.cat([_zeros(x, frames) if past is None else past, x], dim=1)
            self.state[name] = x[:, -frames:].detach().clone()
        return past


class CausalConv3d(nn.Conv3d):
    """Convolution over B T H W C that sees the two frames before each frame; zeros before the first one."""

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        past = cache.swap(x, 2)
        if past is None and cache.padded:
            past = _zeros(x, 2)
        return _convolve(x if past is None else torch.cat([past, x], dim=1), self, cache.shard)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        # In the released model's list the places 1, 4 and 5 are SiLU, SiLU and dropout, which have no weights.
        self.residual = nn.ModuleDict(
            {
                "0": Norm(in_dim),
                "2": CausalConv3d(in_dim, out_dim, 3),
                "3": Norm(out_dim),
                "6": CausalConv3d(out_dim, out_dim, 3),
            }
        )
        self.shortcut = nn.Conv3d(in_dim, out_dim, 1) if in_dim != out_dim else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        norm1, conv1, norm2, conv2 = self.residual.values()
        y = conv1(norm1(x), cache)
        y = conv2(norm2(y), cache)
        x = x[:, -y.shape[1] :]  # all of it, unless nothing is padded
        return y + (x if self.shortcut is None else _pointwise(x, self.shortcut))


class Attention(nn.Module):
    """Single-head attention within each frame. Nothing crosses time, so `cache` stays as it is."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = Norm(dim, silu=False, spatial=True)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        tokens = self.norm(x).flatten(0, 1).flatten(1, 2)  # (B T) (H W) C
        q, k, v = _pointwise(tokens, self.to_qkv).unsqueeze(1).chunk(3, dim=-1)
        if cache.shard is not None:
            k, v = cache.shard.gather(k, 2), cache.shard.gather(v, 2)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + _pointwise(y, self.proj).view(x.shape)


class Downsample(nn.Module):
    """Halves height and width, then, if `temporal`, the frames after the first one of the clip."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if cache.shard is None:
            x = _by_frame(self.resample, x)
        else:  # the row below is the neighbour's, and only the column beside the picture is padded
            x = _by_frame(
                lambda frame: self.resample[1](F.pad(frame, (0, 1))), cache.shard.with_neighbours(x)[:, :, 1:]
            )
        return x if self.time_conv is None else self._halve_time(x, cache)

    def _halve_time(self, x: Tensor, cache: FeatureCache) -> Tensor:
        past = cache.swap(x, 1)
        if past is not None:
            return _convolve(torch.cat([past, x], dim=1), self.time_conv)
        first = x[:, :1]
        return torch.cat([first, _convolve(x, self.time_conv)], dim=1) if x.shape[1] > 1 else first


class Upsample(nn.Module):
    """Doubles, if `temporal`, the frames after the first one of the clip, then height and width; halves the width."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        x = x if self.time_conv is None else self._double_time(x, cache)
        if cache.shard is None:
            return _by_frame(self.resample, x)
        return _by_frame(self.resample, cache.shard.with_neighbours(x))[:, :, 2:-2]

    def _double_time(self, x: Tensor, cache: FeatureCache) -> Tensor:
        if not cache.at_start:
            return self._pairs(x, cache)
        first, rest = x[:, :1], x[:, 1:]
        if rest.shape[1]:
            return torch.cat([first, self._pairs(rest, cache)], dim=1)
        cache.swap(rest, 2)  # the first latent is not cached: the second one sees zeros
        return first

    def _pairs(self, x: Tensor, cache: FeatureCache) -> Tensor:
        earlier, later = self.time_conv(x, cache).chunk(2, dim=-1)
        return torch.stack([earlier, later], dim=2).flatten(1, 2)


class Norm(nn.Module):
    """Channel-wise L2 norm times sqrt(C) and gamma, and SiLU after it if `silu`."""

    def __init__(self, dim: int, silu: bool = True, spatial: bool = False):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1) if spatial else torch.ones(dim, 1, 1, 1))
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.gamma, self.silu)


@fused(small=lambda x, gamma, silu: (x[:, :1, :1], gamma, silu))
def normalize(x: Tensor, gamma: Tensor, silu: bool) -> Tensor:
    """`Norm` of x (..., C), with statistics in float32 or better. Training may compile it: it moves many bytes."""
    exact = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
    scale = x.shape[-1] ** 0.5 / length.clamp_min(1e-12)
    y = x * scale.to(x.dtype) * gamma.flatten().to(x.dtype)
    return F.silu(y) if silu else y


def _convolve(x: Tensor, conv: nn.Conv3d, shard: PictureShard | None = None) -> Tensor:
    """x (B T H W C) through the convolution, without padding in time and with zeros around the picture."""
    if shard is not None and conv.kernel_size[1] > 1:
        return _convolve(shard.with_neighbours(x), conv)[:, :, 1:-1]
    # On a CPU the 2-D convolutions of torch are several times faster than its 3-D one for the few frames of a pass.
    return _convolve_by_frame(x, conv) if x.device.type == "cpu" else _convolve_3d(x, conv)


def _convolve_3d(x: Tensor, conv: nn.Conv3d) -> Tensor:
    pad = conv.kernel_size[-1] // 2
    y = F.conv3d(x.movedim(-1, 1), conv.weight, conv.bias, stride=conv.stride, padding=(0, pad, pad))
    return y.movedim(1, -1)


def _convolve_by_frame(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """One 2-D convolution for each of the frames that an output frame sees, added up."""
    stride, pad = conv.stride[0], conv.kernel_size[-1] // 2
    frames = (x.shape[1] - conv.kernel_size[0]) // stride + 1
    total = None
    for k, weight in enumerate(conv.weight.unbind(2)):
        seen = x[:, k : k + stride * (frames - 1) + 1 : stride]
        bias = conv.bias if total is None else None
        y = _by_frame(lambda frame, w=weight, b=bias: F.conv2d(frame, w, b, padding=pad), seen)
        total = y if total is None else total.add_(y)
    return total


def _by_frame(layer, x: Tensor) -> Tensor:
    """x (B T H W C) through a 2-D layer that takes (B T) C H W."""
    y = layer(x.flatten(0, 1).movedim(-1, 1)).movedim(1, -1)
    return y.unflatten(0, x.shape[:2])


def _pointwise(x: Tensor, conv: nn.Conv2d | nn.Conv3d) -> Tensor:
    """x (..., C) through a convolution of kernel 1."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _cache_key(layer: int) -> str:
    return f"features{layer:02}"


def _zeros(x: Tensor, frames: int) -> Tensor:
    batch, _, *rest = x.shape
    return x.new_zeros(batch, frames, *rest)


def _split(x: Tensor, first: int, size: int) -> Iterator[Tensor]:
    """x (B T ...) in pieces of `size` frames; the first piece has `first` frames more."""
    start, end = 0, first + size
    while start < x.shape[1]:
        yield x[:, start:end]
        start, end = end, end + size


def _check_latents(latents: Tensor, z_dim: int) -> None:
    if latents.dim() != 5 or latents.shape[1] != z_dim or not latents.shape[2]:
        raise ValueError(f"latents must be B {z_dim} T h w with T > 0, got {tuple(latents.shape)}")
