"""Every size and default of a model, read once from YAML. First in the chain; imports nothing of ours.

The sections and keys are those of the released `infworld_config.yaml` (spec section 1); keys that the released
model leaves out have its values as defaults here, so an existing file loads as it is. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

PACKAGE = Path(__file__).resolve().parent
CONFIG_DIR = PACKAGE / "configs"
# `examples/` and `checkpoints/tiny/` lie beside the package in a clone, and within it once it is installed.
INSTALLED = (PACKAGE / "examples").is_dir()
PROJECT_ROOT = PACKAGE if INSTALLED else PACKAGE.parent
MODELS = {"infinite-world": "infworld_config.yaml", "tiny": "tiny.yaml"}  # by name, in CONFIG_DIR
FRAMES_PER_LATENT = 4  # of the causal VAE; the first latent stands for one frame alone
NORM_GROUPS = 32  # of the memory compressor's group norms

# Spec section 2: (height, width), widest first.
RELEASED_BUCKETS = (
    *((320, 1216), (384, 1024), (448, 896), (512, 768), (576, 704), (640, 640), (704, 576), (768, 512)),
    *((832, 448), (896, 448), (960, 384), (1088, 384), (1152, 320), (1216, 320), (1280, 320)),
)

# Spec section 4: per-channel mean and standard deviation of the released VAE's latents.
RELEASED_LATENTS_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
RELEASED_LATENTS_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

# Least and greatest of every number of a config, by the field's name; of lists, of each entry. They are far beyond any
# model that could run, so that a slip or a malicious file is an error at once and not a process without memory.
_BOUNDS = {
    **dict.fromkeys(("dim", "dim_attn", "caption_channels", "freq_dim"), (2, 32_768)),
    **dict.fromkeys(("memory_hidden_dim", "action_embed_dim", "action_hidden_dim"), (1, 32_768)),
    **dict.fromkeys(("ffn_dim", "dim_ffn"), (1, 131_072)),
    **dict.fromkeys(("num_heads", "memory_num_heads", "num_layers"), (1, 256)),
    **dict.fromkeys(("in_channels", "out_channels", "z_dim"), (1, 1024)),
    **dict.fromkeys(("fold", "patch"), (1, 16)),
    **{"dim_mult": (1, 64), "num_res_blocks": (0, 64), "latents_mean": (-1e6, 1e6), "latents_std": (1e-6, 1e6)},
    **{"model_max_length": (1, 65_536), "vocab": (1, 10_000_000), "num_buckets": (2, 4096)},
    **{"shift": (1e-3, 1000), "num_sampling_steps": (1, 1000), "text_cfg_scale": (-100, 100)},
    **{"settled": (0, 1000), "memory_guidance": (0, 100)},
    **{
        "num_frames": (-math.inf, 1001),
        **dict.fromkeys(("chunk_lengths", "live_lengths"), (4, 1000)),
        "live_steps": (0, 1000),
        "fps": (1, 240),
        "trained_chunks": (1, 10_000),
        "max_chunks": (1, 10_000),
    },
    "buckets": (-math.inf, 4096),
}
MAX_BYTES, MAX_DEPTH, MAX_ENTRIES = 100_000, 16, 1000  # of a config file, of its nesting, of a list in it


class _Bounded:
    """A section whose numbers are within `_BOUNDS`."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if name in _BOUNDS:
                _check_bounds(name, value, *_BOUNDS[name])


def _check_bounds(name: str, value: Any, least: float, most: float) -> None:
    if isinstance(value, tuple):
        for entry in value:
            _check_bounds(name, entry, least, most)
    elif not least <= value <= most:
        allowed = f"at most {most:g}" if least == -math.inf else f"from {least:g} to {most:g}"
        raise ValueError(f"{name} must be {allowed}, not {reprlib.repr(value)}")


@dataclass(frozen=True)
class TransformerConfig(_Bounded):
    """`model_cfg`: diffusion transformer, memory compressor and action encoder (spec sections 6 and 7)."""

    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 20
    out_channels: int = 16
    caption_channels: int = 4096
    memory_hidden_dim: int = 256
    memory_num_heads: int = 8
    action_embed_dim: int = 256
    action_hidden_dim: int = 512
    patch: int = 2  # latents a side that make a token
    model_type: str = "t2v"

    def __post_init__(self):
        super().__post_init__()
        _check_heads("dim", self.dim, "num_heads", self.num_heads)
        _check_heads("memory_hidden_dim", self.memory_hidden_dim, "memory_num_heads", self.memory_num_heads)
        if self.in_channels <= self.out_channels:
            raise ValueError(
                f"in_channels ({self.in_channels}) must be more than out_channels ({self.out_channels}): "
                "the latents and a mask"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, not {self.freq_dim}")
        if self.memory_hidden_dim % NORM_GROUPS:
            raise ValueError(f"memory_hidden_dim must be a multiple of {NORM_GROUPS}, not {self.memory_hidden_dim}")


def _check_heads(name: str, dim: int, heads_name: str, heads: int) -> None:
    if dim % (2 * heads):
        raise ValueError(f"{name} ({dim}) must be an even multiple of {heads_name} ({heads})")


@dataclass(frozen=True)
class VAEConfig(_Bounded):
    """`vae_cfg`: the causal video VAE (spec section 4)."""

    vae_pth: str = ""
    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    latents_mean: tuple[float, ...] = RELEASED_LATENTS_MEAN
    latents_std: tuple[float, ...] = RELEASED_LATENTS_STD
    fold: int = 1  # pixels a side that the network takes as one

    @property
    def space(self) -> int:
        """Pixels a side of a latent: 8."""
        return self.fold * 2 ** (len(self.dim_mult) - 1)

    def __post_init__(self):
        super().__post_init__()
        if len(self.dim_mult) < 3:
            raise ValueError(
                f"dim_mult must have 3 entries or more, since time is halved twice, not {len(self.dim_mult)}"
            )


@dataclass(frozen=True)
class TextConfig(_Bounded):
    """`text_encoder_cfg`: `type: umt5` (spec section 5) or `type: bytes`, our small encoder of UTF-8 bytes."""

    checkpoint_path: str = ""
    tokenizer_path: str = ""
    model_max_length: int = 512
    type: str = "umt5"
    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32


@dataclass(frozen=True)
class SamplerConfig(_Bounded):
    """`val_scheduler_cfg`: rectified flow with Euler steps (spec section 8). `text_cfg_scale` 1 = no guidance.

    preset: of `infworld.presets`, what films are made with unless another is asked for. end_at_zero: whether the steps
    are evenly spaced down to 0, as those of a distilled model, whatever the preset. settled: bound of
    `sampler.settle`, 0 for not at all. memory_guidance: of films, by the memory (`sampler.sample_steps`); 0 for none.
    """

    shift: float = 7.0
    use_reversed_velocity: bool = True
    use_timestep_transform: bool = True
    num_sampling_steps: int = 30
    text_cfg_scale: float = 5.0
    preset: str = "exact"
    end_at_zero: bool = False
    settled: float = 0.0
    memory_guidance: float = 0.0


@dataclass(frozen=True)
class RolloutConfig(_Bounded):
    """`validation_data`: frames per chunk (the first repeats the last known one) and the lengths allowed.

    chunk_lengths: new frames per chunk that the model was trained on; those between count as trained. Other multiples
    of 4, up to `num_frames` - 1, work, but films drift sooner. live_lengths: those that live play chooses from.
    live_steps: of the sampler that live play takes at most, where time matters more; 0: as many as films.
    """

    num_frames: int = 81
    chunk_lengths: tuple[int, ...] = (80,)
    live_lengths: tuple[int, ...] = (80,)
    live_steps: int = 0
    fps: int = 30
    trained_chunks: int = 16  # quality is known to fall apart past this horizon
    max_chunks: int = 50


@dataclass(frozen=True)
class CameraConfig:
    """`camera`: what one frame of an action does, and what the picture shows. Defaults: those of the training worlds.

    turn_degrees, pitch_degrees: of turning and of looking up or down; pitch_limit: degrees up and down at most; step:
    units walked; fov_degrees: horizontal field of view.
    """

    turn_degrees: float = 1.125  # 80 frames are a quarter turn, 320 a full circle
    pitch_degrees: float = 0.75
    pitch_limit: float = 22.5
    step: float = 0.04
    fov_degrees: float = 80.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, not {value!r}")
        if self.fov_degrees >= 180:
            raise ValueError(f"fov_degrees must be below 180, not {self.fov_degrees!r}")


@dataclass(frozen=True)
class ModelConfig(_Bounded):
    """One model: where its weights are and every size. Read with `load_config`."""

    name: str = "infinite-world"
    checkpoint_path: str = ""
    model_cfg: TransformerConfig = field(default_factory=TransformerConfig)
    vae_cfg: VAEConfig = field(default_factory=VAEConfig)
    text_encoder_cfg: TextConfig = field(default_factory=TextConfig)
    val_scheduler_cfg: SamplerConfig = field(default_factory=SamplerConfig)
    validation_data: RolloutConfig = field(default_factory=RolloutConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    amp_dtype: str = "bfloat16"
    buckets: tuple[tuple[int, int], ...] = RELEASED_BUCKETS
    negative_prompt: str = ""
    loras: tuple[str, ...] = ()  # files merged into the transformer, FILE or FILE:weight (`infworld.lora`)
    source: Path | None = None  # the YAML it came from; relative weight paths are looked up from there

    def __post_init__(self):
        super().__post_init__()
        if self.amp_dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"amp_dtype must be bfloat16, float16 or float32, not {self.amp_dtype!r}")
        if self.text_encoder_cfg.type not in ("umt5", "bytes"):
            raise ValueError(f"text_encoder_cfg.type must be umt5 or bytes, not {self.text_encoder_cfg.type!r}")
        if self.text_encoder_cfg.dim != self.model_cfg.caption_channels:
            raise ValueError(
                f"text_encoder_cfg.dim ({self.text_encoder_cfg.dim}) and model_cfg.caption_channels "
                f"({self.model_cfg.caption_channels}) must be equal"
            )
        vae, channels = self.vae_cfg, self.model_cfg.out_channels
        if not vae.z_dim == len(vae.latents_mean) == len(vae.latents_std) == channels:
            raise ValueError(
                f"vae_cfg.z_dim ({vae.z_dim}), the lengths of latents_mean ({len(vae.latents_mean)}) and latents_std "
                f"({len(vae.latents_std)}) and model_cfg.out_channels ({channels}) must be equal"
            )
        frames = self.validation_data.num_frames
        if frames <= 1 or frames % FRAMES_PER_LATENT != 1:
            raise ValueError(f"validation_data.num_frames must be 1 + 4n, n at least 1, not {frames}")
        if wrong := [length for length in self.validation_data.chunk_lengths if length % FRAMES_PER_LATENT]:
            raise ValueError(f"validation_data.chunk_lengths must be multiples of {FRAMES_PER_LATENT}, not {wrong[0]}")
        step = self.token_pixels
        wrong = [b for b in self.buckets if len(b) != 2 or any(side <= 0 or side % step for side in b)]
        if wrong or not self.buckets:
            raise ValueError(
                f"buckets must be (height, width) pairs of positive multiples of {step}, "
                f"not {wrong[0] if wrong else self.buckets}"
            )

    @property
    def token_pixels(self) -> int:
        """Pixels a side of a token: 16, of 2 latents of 8."""
        return self.vae_cfg.space * self.model_cfg.patch

    @property
    def chunk_frames(self) -> int:
        """New frames per chunk: 80."""
        return self.validation_data.num_frames - 1

    def check_chunk_frames(self, frames: int | None) -> int:
        """New frames of a chunk: a multiple of 4 up to 80, or, for None, 80. Raises ValueError for anything else."""
        if frames is None:
            return self.chunk_frames
        if type(frames) is not int or frames % FRAMES_PER_LATENT or not 0 < frames <= self.chunk_frames:
            raise ValueError(
                f"a chunk has {FRAMES_PER_LATENT} to {self.chunk_frames} new frames, in steps of {FRAMES_PER_LATENT}, "
                f"not {frames!r}"
            )
        return frames

    def untrained_note(self, frames: int) -> str | None:
        """What to know before chunks of so many new frames are made, if the model was not trained on such."""
        lengths = self.validation_data.chunk_lengths
        if min(lengths) <= frames <= max(lengths):
            return None
        trained = f"{min(lengths)} to {max(lengths)}" if len(set(lengths)) > 1 else str(lengths[0])
        return (
            f"{self.name} was trained on chunks of {trained} frames: with {frames} the picture drifts sooner, and it "
            "remembers less of what it has seen"
        )

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """Height and width of the largest picture."""
        return max(self.buckets, key=lambda bucket: bucket[0] * bucket[1])

    @property
    def chunk_latents(self) -> int:
        """Noisy latents per chunk: 21."""
        return 1 + self.chunk_frames // FRAMES_PER_LATENT

    def path(self, relative: str) -> Path:
        """Where a weight file of this config is: absolute as given, else from the YAML's project or here.

        A torch file gives way to its converted form, the `.safetensors` of the same name beside it.
        """
        path = Path(relative).expanduser()
        places = [PROJECT_ROOT, Path.cwd()]
        if self.source is not None:
            places[:0] = [self.source.parent, self.source.parent.parent]
        # An absolute path stays itself, whatever stands before it.
        candidates = [faster_form(place / path) for place in places]
        return next((candidate for candidate in candidates if candidate.exists()), PROJECT_ROOT / path)

    @property
    def max_frames(self) -> int:
        """Frames of the longest film."""
        return 1 + self.chunk_frames * self.validation_data.max_chunks

    def chunks_for(self, num_frames: int, chunk_frames: int | None = None) -> int:
        """Chunks of `chunk_frames` new frames (None: 80) that a film of `num_frames` takes.

        Raises ValueError if it is not 1 + whole chunks or too long.
        """
        per_chunk = self.check_chunk_frames(chunk_frames)
        most = (self.max_frames - 1) // per_chunk
        if isinstance(num_frames, bool) or not isinstance(num_frames, int):
            raise ValueError(f"the number of frames must be a whole number, not {num_frames!r}")
        chunks, rest = divmod(num_frames - 1, per_chunk)
        if num_frames < 1 + per_chunk:
            raise ValueError(f"a film has at least {1 + per_chunk} frames (one chunk), not {num_frames}")
        if num_frames > 1 + most * per_chunk:
            raise ValueError(f"a film has at most {1 + most * per_chunk} frames ({most} chunks), not {num_frames}")
        if rest:
            near = 1 + chunks * per_chunk
            raise ValueError(
                f"a film is the picture and whole chunks of {per_chunk} frames: ask for {near} or "
                f"{near + per_chunk} frames, not {num_frames}"
            )
        return chunks


def faster_form(path: Path) -> Path:
    """The `.safetensors` that `infworld convert` wrote beside a torch file, else the path itself.

    A torch file that has changed since then is newer, and is taken.
    """
    if path.suffix not in (".ckpt", ".pth"):
        return path
    converted = path.with_suffix(".safetensors")
    stale = converted.is_file() and path.is_file() and converted.stat().st_mtime < path.stat().st_mtime
    return converted if converted.is_file() and not stale else path


def load_config(name_or_path: str | Path) -> ModelConfig:
    """Reads a model's config: "tiny", "infinite-world", or the path of a YAML file.

    Raises FileNotFoundError for a missing file, ValueError for an unknown name, an unknown key or a bad value.
    """
    path = CONFIG_DIR / MODELS[name_or_path] if name_or_path in MODELS else Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"unknown model {str(name_or_path)!r}: use {', '.join(MODELS)} or the path of a .yaml file")
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path}")
    try:
        data = _read_yaml(path)
    except (yaml.YAMLError, ValueError) as error:  # such as a number of too many digits
        raise ValueError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
    config = from_dict(ModelConfig, data, where=str(path))
    return dataclasses.replace(config, source=path.resolve())


def _read_yaml(path: Path) -> Any:
    """What a YAML file says. Raises ValueError for one that is too large, too deep or repeats itself by aliases."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes, a config at most {MAX_BYTES:,}")
    text = path.read_text(encoding="utf-8-sig")
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(
                f"it has an alias (*{event.anchor}), of which a few lines can make gigabytes: write it out"
            )
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return yaml.safe_load(text)


def from_dict(cls: type, data: Any, where: str) -> Any:
    """Builds the frozen dataclass `cls` from nested dicts; `where` names the place in error messages."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a mapping of settings, found {type(data).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "source"}
    if unknown := [key for key in data if key not in fields]:
        raise ValueError(f"{where}: unknown key {reprlib.repr(unknown[0])}; known are {', '.join(sorted(fields))}")
    default = cls()
    values = {key: _value(getattr(default, key), value, f"{where}: {key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def to_dict(config: ModelConfig) -> dict:
    """The plain nested dict that `from_dict` reads back, for YAML."""
    data = dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    data.pop("source")
    return data


def _value(default: Any, value: Any, where: str) -> Any:
    """Checks a YAML value against the type of its field's default and converts it."""
    if dataclasses.is_dataclass(default):
        return from_dict(type(default), value, where)
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {reprlib.repr(value)}")
        if len(value) > MAX_ENTRIES:
            raise ValueError(f"{where}: a list has at most {MAX_ENTRIES} entries, not {len(value)}")
        return tuple(_value(default[0] if default else "", item, where) for item in value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not type(default):
        raise ValueError(f"{where}: expected {type(default).__name__}, found {reprlib.repr(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite number, found {value}")
    return value


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
