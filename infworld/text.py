"""Prompt -> text embedding: the released model's umT5 through transformers, and our own small encoder of bytes.

Both clean the text, pad it to `model_max_length` and return the raw output with its mask. How padding is treated is up
to the transformer (spec section 5); its result does not depend on the padding's values.

umT5 is four times as large as the rest of the model and needed only briefly: `UMT5OnDemand` loads it for texts that it
has not seen before and caches their embeddings on disk.
"""

from __future__ import annotations

import hashlib
import html
import logging
import os
import re
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infworld.checkpoint import check_fit, load_strict, read_tensors, save_tensors
from infworld.config import PROJECT_ROOT, ModelConfig, TextConfig
from infworld.quantized import Widened, is_narrow, split_scales, widen

log = logging.getLogger(__name__)

UMT5_MAX_DISTANCE = 128  # of the relative positions; larger distances count as this one
START = 256  # first id of every byte text, so that an empty one has something to attend to; also the padding
BYTE_VOCAB = START + 1
INIT_STD = 0.02

PLACEMENTS = ("auto", "gpu", "cpu")
FILM_ROOM = 12 * 2**30  # bytes of GPU memory that a film of the released model takes beside its weights, at most
ENCODING_ROOM = 2**30  # bytes that umT5 takes beside its weights
EMBEDDINGS_KEPT = 500  # on disk; 16 kB a token each
_SAMPLES, _SAMPLE = 64, 4096  # bytes that are hashed of a weight file, at so many places, to identify it

# Released name -> transformers' name of the umT5 encoder's tensors, outside and inside `blocks.N.`.
_UMT5_NAMES = {"token_embedding": "embed_tokens", "norm": "final_layer_norm"}
_UMT5_BLOCK_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}


# Transformers' own name of the embedding, which its files have, and what ComfyUI's files have besides the encoder.
_SHARED = "shared.weight"
_FILE_EXTRAS = ("scaled_fp8", "spiece_model")


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded texts: hidden (B, L, C) float32, mask (B, L) int64, 1 on text and 0 on padding."""

    hidden: Tensor
    mask: Tensor

    def to(self, device: str | torch.device) -> TextEmbedding:
        return TextEmbedding(self.hidden.to(device), self.mask.to(device))

    def each(self) -> list[TextEmbedding]:
        """Every text by itself, B of them with a batch of 1."""
        return [TextEmbedding(*row) for row in zip(self.hidden.split(1), self.mask.split(1), strict=True)]


def clean_text(text: str) -> str:
    """Mends broken Unicode, undoes HTML escapes (twice) and folds white space (spec section 5)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_text_encoder(
    config: ModelConfig, device: str | torch.device, dtype: torch.dtype
) -> UMT5TextEncoder | ByteTextEncoder:
    """The text encoder of a model with its weights. Raises FileNotFoundError or ValueError naming a missing or
    unsuitable file."""
    text, path = config.text_encoder_cfg, _weights(config)
    if text.type == "bytes":
        return load_strict(lambda: ByteTextEncoder(text), read_tensors(path), where=path, device=device, dtype=dtype)
    tokenizer = load_tokenizer(_tokenizer_folder(config))
    return UMT5TextEncoder(load_umt5(text, path, torch.device(device), dtype), tokenizer, text.model_max_length)


def open_text_encoder(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, placement: str = "auto"
) -> UMT5OnDemand | ByteTextEncoder:
    """A model's text encoder for filming: umT5 on demand (`placement`: see there), or the small encoder itself.

    Raises the errors of `load_text_encoder`, as far as they show without reading 11 GB.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"the text encoder's placement must be auto, gpu or cpu, not {placement!r}")
    if config.text_encoder_cfg.type == "bytes":
        return load_text_encoder(config, device, dtype)
    return UMT5OnDemand(config, device, dtype, placement)


class UMT5OnDemand:
    """umT5, in memory only while a new text needs it; embeddings are cached on disk.

    placement: "auto" encodes on `device` if umT5 fits there, and stays loaded if that leaves room for a film; otherwise
    it encodes on the CPU. "gpu": loaded at once and kept, as ZeroGPU requires. "cpu": never on the GPU; the file is
    memory-mapped, so that the system may drop its pages.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, placement: str = "auto"):
        self._config, self._device, self._dtype, self._placement = config, device, dtype, placement
        self._encoder: UMT5TextEncoder | None = None
        self._lock = threading.Lock()
        text = config.text_encoder_cfg
        self._path, self._tokenizer = _weights(config), _tokenizer_folder(config)
        tensors, _ = read_umt5(text, self._path)
        self._bytes = sum(tensor.numel() * min(tensor.itemsize, dtype.itemsize) for tensor in tensors.values())
        if placement == "gpu":
            self._encoder = self._load(device)

    def encode(self, texts: list[str]) -> TextEmbedding:
        """As `UMT5TextEncoder.encode`, on any device; padding is zero."""
        length = self._config.text_encoder_cfg.model_max_length
        with self._lock:
            known = {text: self._remembered(text) for text in texts}
            if new := [text for text, hidden in known.items() if hidden is None]:
                known |= self._encode(new)
        sizes = [len(known[text]) for text in texts]
        hidden = torch.stack([F.pad(known[text], (0, 0, 0, length - len(known[text]))) for text in texts])
        mask = torch.tensor([[1] * size + [0] * (length - size) for size in sizes])
        return TextEmbedding(hidden, mask)

    def _encode(self, texts: list[str]) -> dict[str, Tensor]:
        """Hidden states (tokens, C) float32 of each text, on the CPU; cached."""
        if self._encoder is None:
            self._encoder = self._load(place(self._placement, self._device, self._bytes))
        found = {}
        for text in texts:  # one by one, as a cached embedding must not depend on the rest of a batch
            encoded = self._encoder.encode([text])
            found[text] = encoded.hidden[0, : int(encoded.mask.sum())].cpu()
            _remember(self._file(text), found[text])
        device = self._encoder.device
        if self._placement != "gpu" and (device.type == "cpu" or free_memory(device) < FILM_ROOM):
            self._encoder = None
        return found

    def _load(self, device: torch.device) -> UMT5TextEncoder:
        began = time.monotonic()
        text = self._config.text_encoder_cfg
        tokenizer = load_tokenizer(self._tokenizer)
        # On the CPU the tensors stay where they are, in the file.
        stack = load_umt5(text, self._path, device, self._dtype if device.type == "cuda" else None)
        encoder = UMT5TextEncoder(stack, tokenizer, text.model_max_length)
        log.info("text encoder on %s in %.1f s", device, time.monotonic() - began)
        return encoder

    def _remembered(self, text: str) -> Tensor | None:
        path = self._file(text)
        try:
            hidden = read_tensors(path)["hidden"]
            os.utime(path)
        except (OSError, ValueError, KeyError):  # missing or truncated
            return None
        return hidden

    def _file(self, text: str) -> Path:
        name = hashlib.sha256(f"{self._identity} {clean_text(text)}".encode(errors="replace")).hexdigest()
        return embeddings_folder() / f"{name}.safetensors"

    @cached_property
    def _identity(self) -> str:
        """Identifies this encoder by its files' content, wherever they are stored."""
        digest = hashlib.sha256(str(self._config.text_encoder_cfg.model_max_length).encode())
        size = self._path.stat().st_size
        with self._path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(i * max(0, size - _SAMPLE) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE))
        for path in sorted(self._tokenizer.glob("*")):
            if path.suffix in (".json", ".model"):
                digest.update(path.read_bytes())
        return digest.hexdigest()


def place(placement: str, device: torch.device, size: int) -> torch.device:
    """Where an encoder of `size` bytes encodes, for a model on `device`."""
    fits = device.type == "cuda" and (placement == "gpu" or free_memory(device) >= size + ENCODING_ROOM)
    return device if placement != "cpu" and fits else torch.device("cpu")


def free_memory(device: torch.device) -> int:
    """GPU memory in bytes that this process can still allocate, including what torch has cached but does not use."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    allowed = total * torch.cuda.get_per_process_memory_fraction(device) - allocated
    return int(min(allowed, free + torch.cuda.memory_reserved(device) - allocated))


def embeddings_folder() -> Path:
    """Where text embeddings are cached: below XDG_CACHE_HOME, else ~/.cache, else (without a home) the project."""
    try:
        home = Path.home()
    except RuntimeError:
        home = PROJECT_ROOT
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "infinite-world" / "text"


def _remember(path: Path, hidden: Tensor) -> None:
    """Caches an embedding and removes the oldest ones beyond the limit."""
    try:
        save_tensors(path, {"hidden": hidden})
        files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for old in files[:-EMBEDDINGS_KEPT]:
            old.unlink()
    except (ValueError, OSError) as error:
        log.warning("the text will have to be encoded again next time: %s", error)


class UMT5TextEncoder(nn.Module):
    """umT5's encoder with its tokenizer. `encoder` is transformers' UMT5Stack, as `build_umt5` makes it."""

    def __init__(self, encoder: nn.Module, tokenizer, model_max_length: int):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length

    @property
    def device(self) -> torch.device:
        return next(self.encoder.parameters()).device

    def encode(self, texts: list[str]) -> TextEmbedding:
        """Cleans, tokenises to exactly `model_max_length` (longer text is cut) and encodes. Padding comes out zero.

        Only the text itself goes through the encoder, since padding is masked there anyway.
        """
        tokens = self.tokenizer(
            [clean_text(text) for text in texts],
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.model_max_length,
            return_tensors="pt",
        )
        longest = int(tokens.attention_mask.sum(dim=1).max())
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        hidden = self(ids[:, :longest], mask[:, :longest])
        hidden = F.pad(hidden * mask[:, :longest, None], (0, 0, 0, self.model_max_length - longest))
        return TextEmbedding(hidden, mask)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, L) int64 -> hidden states (B, L, C) float32, before any product with the mask."""
        return self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()


def build_umt5(config: TextConfig) -> nn.Module:
    """umT5's encoder stack of these sizes: every layer with its own relative positions, tanh GELU."""
    # Imported here because it takes seconds, and only the released model needs it.
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = UMT5Config(
        vocab_size=config.vocab,
        d_model=config.dim,
        d_kv=config.dim_attn // config.num_heads,
        d_ff=config.dim_ffn,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=UMT5_MAX_DISTANCE,
        feed_forward_proj="gated-gelu",
    )
    # The stack alone: the model around it only adds a second name for the token embedding.
    return UMT5EncoderModel(sizes).encoder


def load_umt5(config: TextConfig, path: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """umT5's stack of a file, computing in `dtype`; None: in float32 with its weights left as they are in the file.

    Weights of 8 bits stay as they are in either case, and each block is widened while it computes.
    """
    tensors, scales = read_umt5(config, path)
    narrow = any(map(is_narrow, tensors.values()))
    stack = load_strict(
        lambda: build_umt5(config).requires_grad_(False),
        tensors,
        where=path,
        device=device,
        dtype=None if narrow else dtype,
    )
    return stack if dtype and not narrow else widened(stack, dtype or torch.float32, scales)


def widened(encoder: nn.Module, dtype: torch.dtype = torch.float32, scales: Mapping[str, Tensor] | None = None):
    """umT5's stack computing in `dtype` whatever its weights are, which stay as they are, block by block.

    scales: of weights of 8 bits, by name. On a CPU 16-bit arithmetic is slow, and a copy of all weights would be 23 GB.
    """
    scales = {name: scale.to(encoder.device) for name, scale in (scales or {}).items()}
    for index, block in enumerate(encoder.block):
        start = f"block.{index}."
        own = {name.removeprefix(start): scale for name, scale in scales.items() if name.startswith(start)}
        encoder.block[index] = Widened(block, dtype, own)
    table = encoder.embed_tokens.weight
    if is_narrow(table):  # rows of which torch cannot look up
        encoder.embed_tokens.weight = nn.Parameter(
            widen(table, scales.get("embed_tokens.weight"), torch.bfloat16), requires_grad=False
        )
    encoder.embed_tokens.register_forward_hook(lambda module, args, output: output.to(dtype))
    encoder.final_layer_norm.to(dtype)
    return encoder


def read_umt5(config: TextConfig, path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's tensors and the scales of those with 8 bits, both under transformers' names: from the released
    file, or one with transformers' names, such as ComfyUI's. Raises ValueError for one that does not fit."""
    tensors, scales = split_scales(read_tensors(path), path)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in _FILE_EXTRAS}
    expected = umt5_shapes(config)
    if _SHARED in tensors:
        tensors, scales = _without_prefix(tensors), _without_prefix(scales)
        expected = {_umt5_name(name): shape for name, shape in expected.items()}
    check_fit(expected, tensors, path)
    return umt5_names(tensors), umt5_names(scales)


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the whole model by their names in its encoder, where the embedding has a name of its own."""
    renamed = {"embed_tokens.weight" if name == _SHARED else name: tensor for name, tensor in tensors.items()}
    return {name.removeprefix("encoder."): tensor for name, tensor in renamed.items()}


def umt5_shapes(config: TextConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in the released encoder's file, or one of other sizes."""
    dim, attn, ffn, heads = config.dim, config.dim_attn, config.dim_ffn, config.num_heads
    block = {
        **{"norm1": (dim,), "norm2": (dim,), "attn.o": (dim, attn)},
        **dict.fromkeys(("attn.q", "attn.k", "attn.v"), (attn, dim)),
        **{"ffn.gate.0": (ffn, dim), "ffn.fc1": (ffn, dim), "ffn.fc2": (dim, ffn)},
        "pos_embedding.embedding": (config.num_buckets, heads),
    }
    shapes = {"token_embedding": (config.vocab, dim), "norm": (dim,)}
    shapes |= {f"blocks.{i}.{part}": shape for i in range(config.num_layers) for part, shape in block.items()}
    return {f"{name}.weight": torch.Size(shape) for name, shape in shapes.items()}


def umt5_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Released tensors under transformers' names; an unknown name stays, for strict loading to report."""
    return {_umt5_name(name): tensor for name, tensor in tensors.items()}


def _umt5_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", stem):
        number, part = match.groups()
        renamed = _UMT5_BLOCK_NAMES.get(part)
        return f"block.{number}.{renamed}.weight" if renamed else name
    return f"{_UMT5_NAMES[stem]}.weight" if stem in _UMT5_NAMES else name


def _weights(config: ModelConfig) -> Path:
    if not config.text_encoder_cfg.checkpoint_path:
        raise ValueError("text_encoder_cfg.checkpoint_path is empty: the config must name the text encoder's weights")
    return config.path(config.text_encoder_cfg.checkpoint_path)


def _tokenizer_folder(config: ModelConfig) -> Path:
    if not config.text_encoder_cfg.tokenizer_path:
        raise ValueError("text_encoder_cfg.tokenizer_path is empty: the config must name the umT5 tokenizer's folder")
    return _existing(config.path(config.text_encoder_cfg.tokenizer_path))


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer folder at {folder}: download it there or correct tokenizer_path")
    return folder


def load_tokenizer(folder: Path):
    """The tokenizer in a local folder; nothing is downloaded."""
    _existing(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder} has no usable tokenizer: download the whole folder again ({reason})") from error


class ByteTextEncoder(nn.Module):
    """Our small text encoder: UTF-8 bytes, learned positions, pre-norm transformer. Untrained until loaded.

    Sizes: `dim`, `dim_ffn`, `num_heads`, `num_layers`, `model_max_length` of the config; `vocab` must be 257.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.vocab != BYTE_VOCAB:
            raise ValueError(f"text_encoder_cfg.vocab must be {BYTE_VOCAB} for type bytes, not {config.vocab}")
        if config.dim % config.num_heads:
            raise ValueError(
                f"text_encoder_cfg.dim ({config.dim}) must be a multiple of num_heads ({config.num_heads})"
            )
        self.model_max_length = config.model_max_length
        self.token_embedding = nn.Embedding(BYTE_VOCAB, config.dim)
        self.position_embedding = nn.Embedding(config.model_max_length, config.dim)
        self.blocks = nn.ModuleList(
            ByteBlock(config.dim, config.dim_ffn, config.num_heads) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self._initialize()

    def encode(self, texts: list[str]) -> TextEmbedding:
        """Cleans, tokenises to exactly `model_max_length` (longer text is cut) and encodes."""
        ids, mask = self.tokenize(texts)
        device = self.norm.weight.device
        ids, mask = ids.to(device), mask.to(device)
        return TextEmbedding(self(ids, mask), mask)

    def tokenize(self, texts: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, model_max_length) int64 on the CPU: START, the cleaned text's bytes, padding."""
        length = self.model_max_length
        rows = [[START, *_cut(clean_text(text), length - 1)] for text in texts]
        ids = [row + [START] * (length - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        return torch.tensor(ids), torch.tensor(mask)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask (B, L) int64, L <= model_max_length -> hidden states (B, L, dim) float32."""
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        visible = mask.bool()[:, None, None, :]
        for block in self.blocks:
            x = block(x, visible)
        return self.norm(x).float()

    def _initialize(self) -> None:
        """Small weights, so that training from scratch starts from nearly the embeddings alone."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)


class ByteBlock(nn.Module):
    """Self-attention over the visible positions and a feed-forward net, each after a LayerNorm and added."""

    def __init__(self, dim: int, dim_ffn: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, dim_ffn), nn.GELU(approximate="tanh"), nn.Linear(dim_ffn, dim))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x (B, L, C), visible (B, 1, 1, L) bool."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (n h d) -> n b h l d", n=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + self.out(rearrange(attended, "b h l d -> b l (h d)"))
        return x + self.ffn(self.norm2(x))


def _cut(text: str, length: int) -> bytes:
    """The first bytes of a text, at most `length`, ending with a whole character."""
    return text.encode("utf-8", errors="replace")[:length].decode("utf-8", errors="ignore").encode("utf-8")
