"""Prompt -> text embedding: the released model's umT5 through transformers, and our own small encoder of bytes.

Both clean the text, pad it to `model_max_length` and give the raw output with its mask; what the transformer does
with the padding is its own affair (spec section 5).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from infworld.checkpoint import load_strict, read_tensors
from infworld.config import ModelConfig, TextConfig

UMT5_MAX_DISTANCE = 128  # of the relative positions; further apart counts as this far
START = 256  # first id of every byte text, so that an empty one has something to attend to; also the padding
BYTE_VOCAB = START + 1
INIT_STD = 0.02

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


@dataclass(frozen=True)
class TextEmbedding:
    """Encoded texts: hidden (B, L, C) float32, mask (B, L) int64, 1 on text and 0 on padding."""

    hidden: Tensor
    mask: Tensor

    def to(self, device: str | torch.device) -> TextEmbedding:
        return TextEmbedding(self.hidden.to(device), self.mask.to(device))


def clean_text(text: str) -> str:
    """Mends broken Unicode, undoes HTML escapes (twice) and folds white space (spec section 5)."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_text_encoder(
    config: ModelConfig, device: str | torch.device, dtype: torch.dtype
) -> UMT5TextEncoder | ByteTextEncoder:
    """The text encoder of a model with its weights. FileNotFoundError or ValueError names a file that is not right."""
    text = config.text_encoder_cfg
    if not text.checkpoint_path:
        raise ValueError("text_encoder_cfg.checkpoint_path is empty: the config must name the text encoder's weights")
    path = config.path(text.checkpoint_path)
    if text.type == "bytes":
        return load_strict(lambda: ByteTextEncoder(text), read_tensors(path), where=path, device=device, dtype=dtype)
    if not text.tokenizer_path:
        raise ValueError("text_encoder_cfg.tokenizer_path is empty: the config must name the umT5 tokenizer's folder")
    tokenizer = load_tokenizer(config.path(text.tokenizer_path))
    encoder = load_strict(
        lambda: build_umt5(text), umt5_names(read_tensors(path)), where=path, device=device, dtype=dtype
    )
    return UMT5TextEncoder(encoder, tokenizer, text.model_max_length)


class UMT5TextEncoder(nn.Module):
    """umT5's encoder with its tokenizer. `encoder` is transformers' UMT5Stack, as `build_umt5` makes it."""

    def __init__(self, encoder: nn.Module, tokenizer, model_max_length: int):
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.model_max_length = model_max_length

    def encode(self, texts: list[str]) -> TextEmbedding:
        """Cleans, tokenises to exactly `model_max_length` (longer text is cut) and encodes."""
        tokens = self.tokenizer(
            [clean_text(text) for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.model_max_length,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
        return TextEmbedding(self(ids, mask), mask)

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


def load_tokenizer(folder: Path):
    """The tokenizer in a local folder; nothing is downloaded."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer folder at {folder}: download it there or correct tokenizer_path")
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
    """The first bytes of a text, at most `length`, without half a character at the end."""
    return text.encode("utf-8", errors="replace")[:length].decode("utf-8", errors="ignore").encode("utf-8")
