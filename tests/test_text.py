"""Text: cleaning, the umT5 encoder against its golden tensors, and our encoder of bytes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import infworld
from infworld import text as text_module
from infworld.checkpoint import load_strict, read_tensors, save_tensors
from infworld.config import ModelConfig, TextConfig, TransformerConfig, from_dict, load_config
from infworld.text import (
    BYTE_VOCAB,
    START,
    ByteTextEncoder,
    TextEmbedding,
    UMT5OnDemand,
    UMT5TextEncoder,
    build_umt5,
    clean_text,
    embeddings_folder,
    load_text_encoder,
    open_text_encoder,
    place,
    umt5_names,
    umt5_shapes,
    widened,
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
    with pytest.raises(ValueError, match=r"missing: blocks.0.attn.q.weight.*extra: blocks.0.attn.bogus.weight"):
        load(checkpoint_path=str(tmp_path / "foreign.safetensors"), tokenizer_path=str(tokenizer_folder))


def test_umt5_with_16_bit_weights_computes_in_float32_on_a_cpu(golden_umt5):
    config, encoder = golden_umt5
    io = load_file(GOLDEN / "t5_io.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in encoder.state_dict().items()}
    narrow = load_strict(lambda: build_umt5(config), rounded, where="golden")
    wide = load_strict(lambda: build_umt5(config), {n: t.float() for n, t in rounded.items()}, where="golden")
    hidden = UMT5TextEncoder(widened(narrow), None, 10)(io["ids"], io["mask"])
    expected = UMT5TextEncoder(wide, None, 10)(io["ids"], io["mask"])
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    weights = {p.data_ptr() for p in rounded.values()}
    assert {p.data_ptr() for p in narrow.parameters() if p.ndim == 2} <= weights  # no weight was copied


def test_released_shapes_are_known_without_building_the_encoder(golden_umt5):
    for config in (golden_umt5[0], TextConfig()):
        with torch.device("meta"):
            built = build_umt5(config).state_dict()
        shapes = {name: torch.empty(shape, device="meta") for name, shape in umt5_shapes(config).items()}
        assert {n: t.shape for n, t in umt5_names(shapes).items()} == {n: t.shape for n, t in built.items()}


# -------------------------------------------------------------------------------------------------------- on demand


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty folder of embeddings."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "infinite-world" / "text"


@pytest.fixture
def loads(monkeypatch) -> list:
    """Grows with every time that umT5 is loaded."""
    found, load = [], UMT5OnDemand._load
    monkeypatch.setattr(UMT5OnDemand, "_load", lambda self, device: found.append(device) or load(self, device))
    return found


def on_demand(settings: Path, placement: str = "auto") -> UMT5OnDemand:
    return open_text_encoder(load_config(settings), torch.device("cpu"), torch.float32, placement)


@torch.inference_mode()
def encode(encoder, *texts: str) -> TextEmbedding:
    return encoder.encode(list(texts))


def test_umt5_on_demand_gives_what_umt5_gives(random_model, cache):
    texts = ["a snowy street", "", "night &amp; fog " * 20]
    eager = encode(load_text_encoder(load_config(random_model), "cpu", torch.float32), *texts)
    for _ in range(2):  # computed, and remembered
        text = encode(on_demand(random_model), *texts)
        assert torch.equal(text.mask, eager.mask) and text.hidden.dtype == torch.float32
        torch.testing.assert_close(text.hidden, eager.hidden, rtol=1e-4, atol=1e-5)
        assert not (text.hidden * (1 - text.mask[..., None])).any()


def test_a_text_is_encoded_once_ever_and_umt5_is_not_kept(random_model, cache, loads):
    encoder = on_demand(random_model)
    assert loads == [] and not cache.exists()
    first = encode(encoder, "a snowy street")
    assert len(loads) == 1 and encoder._encoder is None
    again = encode(on_demand(random_model), " a  snowy street")  # the same, cleaned
    assert len(loads) == 1 and torch.equal(first.hidden, again.hidden) and torch.equal(first.mask, again.mask)
    encode(on_demand(random_model), "a snowy street", "a wood")
    assert len(loads) == 2 and len(list(cache.iterdir())) == 2


def test_another_encoder_or_tokenizer_remembers_nothing_of_this_one(random_model, cache, loads, tmp_path):
    copy = shutil.copytree(random_model.parent, tmp_path / "copy") / random_model.name
    encode(on_demand(random_model), "a wood")
    encode(on_demand(copy), "a wood")
    assert len(loads) == 1  # a copy is the same
    weights = copy.parent / "models" / "models_t5_umt5-xxl-enc-bf16.pth"
    tensors = {name: tensor.clone() for name, tensor in read_tensors(weights).items()}
    tensors["blocks.1.ffn.fc1.weight"] *= 2
    torch.save(tensors, weights)
    encode(on_demand(copy), "a wood")
    assert len(loads) == 2
    tokenizer = copy.parent / "models" / "google" / "umt5-xxl" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"zz"', '"zzz"'))
    encode(on_demand(copy), "a wood")
    assert len(loads) == 3


def test_a_damaged_or_unwritable_memory_costs_time_only(random_model, cache, loads, caplog):
    first = encode(on_demand(random_model), "a wood")
    (file,) = cache.iterdir()
    for damage in (file.read_bytes()[:-9], b"", b"x" * 200):
        file.write_bytes(damage)
        assert torch.equal(encode(on_demand(random_model), "a wood").hidden, first.hidden)
    assert len(loads) == 4
    file.unlink()
    cache.rmdir()
    cache.write_text("no folder")
    assert torch.equal(encode(on_demand(random_model), "a wood").hidden, first.hidden)
    assert "will have to be encoded again" in caplog.text


def test_only_the_latest_texts_are_remembered(random_model, cache, monkeypatch, loads):
    monkeypatch.setattr(text_module, "EMBEDDINGS_KEPT", 2)
    encoder = on_demand(random_model)
    for age, text in ((30, "one"), (20, "two")):
        encode(encoder, text)
        os.utime(encoder._file(text), (time.time() - age,) * 2)
    encode(encoder, "one")  # used again
    encode(encoder, "three")
    assert {path.name for path in cache.iterdir()} == {encoder._file(text).name for text in ("one", "three")}


def test_embeddings_lie_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert embeddings_folder() == tmp_path / ".cache" / "infinite-world" / "text"


GPU, CPU, GIB = torch.device("cuda:0"), torch.device("cpu"), 2**30


@pytest.mark.parametrize(
    ("placement", "device", "free", "expected"),
    [
        ("auto", GPU, 80 * GIB, GPU),
        ("auto", GPU, 13 * GIB, GPU),
        ("auto", GPU, 11 * GIB, CPU),
        ("auto", CPU, 80 * GIB, CPU),
        ("cpu", GPU, 80 * GIB, CPU),
        ("gpu", GPU, 0, GPU),
        ("gpu", CPU, 0, CPU),
    ],
)
def test_umt5_goes_where_there_is_room(monkeypatch, placement, device, free, expected):
    monkeypatch.setattr(text_module, "free_memory", lambda device: free)
    assert place(placement, device, 11 * GIB) == expected


@pytest.mark.parametrize(
    ("placement", "free", "stays"), [("auto", 40, True), ("auto", 11, False), ("gpu", 1, True), ("cpu", 40, False)]
)
def test_umt5_stays_on_the_gpu_if_a_film_fits_beside_it(random_model, cache, monkeypatch, placement, free, stays):
    class OnDevice:
        def __init__(self, device):
            self.device = device

        def encode(self, texts):
            return TextEmbedding(torch.zeros(1, 32, 64), torch.ones(1, 32, dtype=torch.int64))

    monkeypatch.setattr(text_module, "free_memory", lambda device: free * GIB)
    monkeypatch.setattr(UMT5OnDemand, "_load", lambda self, device: OnDevice(device))
    encoder = UMT5OnDemand(load_config(random_model), GPU, torch.bfloat16, placement)
    assert (encoder._encoder is not None) == (placement == "gpu")  # loaded at once only if it is for good
    encode(encoder, "a wood")
    assert (encoder._encoder is not None) == stays


def test_what_is_wrong_with_umt5_is_seen_without_reading_it(random_model, tmp_path, loads):
    with pytest.raises(ValueError, match="placement must be auto, gpu or cpu, not 'disk'"):
        on_demand(random_model, "disk")
    copy = shutil.copytree(random_model.parent, tmp_path / "copy") / random_model.name
    weights = copy.parent / "models" / "models_t5_umt5-xxl-enc-bf16.pth"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{weights} is truncated: it has .* bytes of .*infworld download"):
        infworld.load(copy, "cpu")
    torch.save({"norm.weight": torch.ones(64)}, weights)
    with pytest.raises(ValueError, match=f"{weights} does not fit the model.*missing: token_embedding.weight"):
        infworld.load(copy, "cpu")
    shutil.rmtree(copy.parent / "models" / "google")
    with pytest.raises(FileNotFoundError, match="no tokenizer folder at"):
        infworld.load(copy, "cpu")
    assert loads == []


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
