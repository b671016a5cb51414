"""Text: cleaning, the umT5 encoder against its golden tensors, and our encoder of bytes."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infworld.checkpoint import load_strict, save_tensors
from infworld.config import ModelConfig, TextConfig, TransformerConfig, from_dict
from infworld.text import (
    BYTE_VOCAB,
    START,
    ByteTextEncoder,
    UMT5TextEncoder,
    build_umt5,
    clean_text,
    load_text_encoder,
    umt5_names,
)

GOLDEN = Path(__file__).parent / "golden"
BYTES = TextConfig(type="bytes", vocab=BYTE_VOCAB, dim=32, dim_ffn=64, num_heads=4, num_layers=2, model_max_length=16)


@pytest.fixture(scope="module")
def golden_umt5() -> tuple[TextConfig, torch.nn.Module]:
    sizes = json.loads((GOLDEN / "config.json").read_text())["t5"]
    sizes.pop("shared_pos")
    config = from_dict(TextConfig, sizes, "golden")
    weights = umt5_names(load_file(GOLDEN / "t5_weights.safetensors"))
    return config, load_strict(lambda: build_umt5(config), weights, where="golden")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "house": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def model_config(text: TextConfig) -> ModelConfig:
    return ModelConfig(text_encoder_cfg=text, model_cfg=TransformerConfig(caption_channels=text.dim))


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\n\treally   red  house ", "a really red house"),
        ("salt &amp;amp; pepper &lt;b&gt;", "salt & pepper <b>"),
        ("cafÃ©", "café"),
        ("it\u00e2\u0080\u0099s", "it's"),
        (" \n ", ""),
        ("", ""),
    ],
)
def test_text_is_cleaned(raw, clean):
    assert clean_text(raw) == clean


def test_umt5_computes_the_golden_hidden_states(golden_umt5):
    _, encoder = golden_umt5
    io = load_file(GOLDEN / "t5_io.safetensors")
    hidden = UMT5TextEncoder(encoder, None, 10)(io["ids"], io["mask"])
    assert (hidden - io["hidden"]).abs().max() < 1e-5 * io["hidden"].abs().max()


def test_umt5_is_loaded_with_its_tokenizer_and_pads_to_the_whole_length(golden_umt5, tokenizer_folder, tmp_path):
    config = dataclasses.replace(
        golden_umt5[0],
        checkpoint_path=str(GOLDEN / "t5_weights.safetensors"),
        tokenizer_path=str(tokenizer_folder),
        model_max_length=7,
    )
    encoder = load_text_encoder(model_config(config), "cpu", torch.float32)
    text = encoder.encode(["a  red&nbsp;house", "", "red " * 20])
    assert text.hidden.shape == (3, 7, config.dim) and text.hidden.dtype == torch.float32
    assert text.mask.tolist() == [[1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0], [1] * 7]
    assert text.hidden.isfinite().all()
    alone = encoder(torch.tensor([[3, 4, 5, 1]]), torch.ones(1, 4, dtype=torch.int64))
    torch.testing.assert_close(text.hidden[:1, :4], alone)
    in_bf16 = load_text_encoder(model_config(config), "cpu", torch.bfloat16).encode(["a red house"])
    assert in_bf16.hidden.dtype == torch.float32
    assert (in_bf16.hidden - text.hidden[:1])[:, :4].abs().max() < 0.1 * text.hidden.abs().max()


def test_umt5_files_that_are_not_right_are_named(golden_umt5, tokenizer_folder, tmp_path):
    config, weights = golden_umt5[0], str(GOLDEN / "t5_weights.safetensors")

    def load(**changes):
        load_text_encoder(model_config(dataclasses.replace(config, **changes)), "cpu", torch.float32)

    with pytest.raises(ValueError, match="text_encoder_cfg.checkpoint_path is empty"):
        load()
    with pytest.raises(ValueError, match="text_encoder_cfg.tokenizer_path is empty"):
        load(checkpoint_path=weights)
    with pytest.raises(FileNotFoundError, match="no tokenizer folder at .*nowhere"):
        load(checkpoint_path=weights, tokenizer_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        load(checkpoint_path=weights, tokenizer_path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no weight file at .*nowhere.pth"):
        load(checkpoint_path=str(tmp_path / "nowhere.pth"), tokenizer_path=str(tokenizer_folder))
    foreign = load_file(weights)
    foreign["blocks.0.attn.bogus.weight"] = foreign.pop("blocks.0.attn.q.weight")
    save_file(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"missing: block.0.*SelfAttention.q.*extra: blocks.0.attn.bogus.weight"):
        load(checkpoint_path=str(tmp_path / "foreign.safetensors"), tokenizer_path=str(tokenizer_folder))


def test_byte_text_has_a_start_its_bytes_and_padding():
    encoder = ByteTextEncoder(BYTES)
    ids, mask = encoder.tokenize(["", "a&amp;b", "é" * 20])
    assert ids.shape == mask.shape == (3, 16) and ids.dtype == mask.dtype == torch.int64
    assert ids[0].tolist() == [START] * 16 and mask[0].sum() == 1
    assert ids[1, :4].tolist() == [START, *b"a&b"] and mask[1].sum() == 4
    # 15 bytes are left for two-byte letters: seven whole ones.
    assert bytes(ids[2, 1:15].tolist()).decode() == "é" * 7 and mask[2].sum() == 15


def test_byte_text_takes_any_string():
    ids, _ = ByteTextEncoder(BYTES).tokenize(["\ud800 lone surrogate", "\x00", "日本語の街並み", "🏠" * 99])
    assert ids.min() >= 0 and ids.max() < BYTE_VOCAB


def test_byte_encoder_ignores_what_stands_in_the_padding_and_its_neighbours_in_the_batch():
    torch.manual_seed(0)
    encoder = ByteTextEncoder(BYTES)
    both = encoder.encode(["", "a red house"])
    assert both.hidden.shape == (2, 16, 32) and both.hidden.dtype == torch.float32 and both.hidden.isfinite().all()
    torch.testing.assert_close(both.hidden[1:], encoder.encode(["a red house"]).hidden)
    ids, mask = encoder.tokenize(["red"])
    filled = torch.where(mask.bool(), ids, torch.randint_like(ids, 256))
    torch.testing.assert_close(encoder(filled, mask)[:, :4], encoder(ids, mask)[:, :4])


def test_byte_encoder_learns_to_tell_texts_apart():
    torch.manual_seed(0)
    encoder = ByteTextEncoder(BYTES)
    ids, mask = encoder.tokenize(["red", "der", "", "a red house"])
    head = torch.nn.Linear(BYTES.dim, 4)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(head(encoder(ids, mask)[:, 0]), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_byte_encoder_is_loaded_as_it_was_saved(tmp_path):
    trained = ByteTextEncoder(BYTES)
    save_tensors(tmp_path / "text.safetensors", trained.state_dict())
    config = model_config(dataclasses.replace(BYTES, checkpoint_path=str(tmp_path / "text.safetensors")))
    loaded = load_text_encoder(config, "cpu", torch.float32)
    assert torch.equal(loaded.encode(["hello"]).hidden, trained.encode(["hello"]).hidden)
    assert load_text_encoder(config, "cpu", torch.bfloat16).encode(["hello"]).hidden.dtype == torch.float32


@pytest.mark.parametrize(("changes", "message"), [({"vocab": 300}, "must be 257"), ({"num_heads": 5}, "multiple")])
def test_byte_encoder_says_which_size_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        ByteTextEncoder(dataclasses.replace(BYTES, **changes))


def test_transformers_is_not_imported_without_need():
    code = "import sys, infworld.text as t; t.ByteTextEncoder; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
