"""umT5 from files of 8 bits as other programs have them, and how far its embeddings are from those of whole weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import infworld
from infworld.checkpoint import load_strict, read_tensors
from infworld.config import TextConfig, from_dict, load_config
from infworld.quantized import Widened, split_scales, widen
from infworld.text import UMT5TextEncoder, build_umt5, load_text_encoder, load_umt5, read_umt5, umt5_names

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
# What 8 bits cost: relative error of the hidden states, somewhat more than measured.
KINDS = {"fp8": 0.15, "int8": 0.05, "int8 by row": 0.05, "int8 by block": 0.05}


def narrow(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """8 bits and the scale, as ComfyUI's guide has it: the largest number becomes the largest of the type."""
    most = 448.0 if kind == "fp8" else 127.0
    if kind == "int8 by block":
        scale = weight.unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).abs().amax((1, 3)) / most
        numbers = weight / scale.repeat_interleave(8, 0).repeat_interleave(8, 1)
    else:
        scale = (weight.abs().amax(1, keepdim=True) if kind == "int8 by row" else weight.abs().amax()) / most
        numbers = weight / scale
    return numbers.to(FP8) if kind == "fp8" else numbers.round().to(torch.int8), scale


def comfy_file(path: Path, released: dict[str, Tensor], kind: str, spelling: str = "scale_weight") -> Path:
    """A file as `umt5_xxl_fp8_e4m3fn_scaled.safetensors` is one: transformers' names, every linear layer in 8 bits, the
    rest in 16, the tokenizer as bytes, and marks."""
    tensors = {"spiece_model": torch.arange(9, dtype=torch.uint8), "scaled_fp8": torch.zeros(0, dtype=FP8)}
    for name, tensor in umt5_names(released).items():
        name = "shared.weight" if name == "embed_tokens.weight" else f"encoder.{name}"
        layer = name.removesuffix(".weight")
        if tensor.ndim == 1 or "shared" in name or "relative" in name:
            tensors[name] = tensor.half()
            continue
        tensors[name], tensors[f"{layer}.{spelling}"] = narrow(tensor.float(), kind)
        if spelling == "weight_scale":
            recipe = json.dumps({"format": "float8_e4m3fn" if kind == "fp8" else "int8_tensorwise"})
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(recipe.encode()), dtype=torch.uint8)
            tensors[f"{layer}.input_scale"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def golden() -> tuple[TextConfig, dict[str, Tensor], dict[str, Tensor]]:
    """Sizes, weights, and ids with the reference's hidden states."""
    sizes = json.loads((GOLDEN / "config.json").read_text())["t5"]
    sizes.pop("shared_pos")
    config = from_dict(TextConfig, sizes, "golden")
    return config, load_file(GOLDEN / "t5_weights.safetensors"), load_file(GOLDEN / "t5_io.safetensors")


def encoded(stack: nn.Module, io: dict[str, Tensor]) -> Tensor:
    """Hidden states of the golden text, without padding."""
    return UMT5TextEncoder(stack, None, 10)(io["ids"], io["mask"])[io["mask"].bool()]


def error_of(found: Tensor, io: dict[str, Tensor]) -> float:
    expected = io["hidden"][io["mask"].bool()]
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_of_8_bits_are_near_those_of_whole_weights(golden, tmp_path, kind, spelling, dtype):
    config, weights, io = golden
    stack = load_umt5(config, comfy_file(tmp_path / "umt5.safetensors", weights, kind, spelling), CPU, dtype)
    error = error_of(encoded(stack, io), io)
    print(f"{kind}, {dtype or torch.float32}: {error:.4f}")
    assert 1e-4 < error < KINDS[kind]
    narrow_ones = [tensor for block in stack.block for tensor in block.parameters() if tensor.itemsize == 1]
    assert len(narrow_ones) == 7 * config.num_layers  # they stay as they are


@pytest.mark.parametrize("kind", KINDS)
def test_widened_weights_are_the_true_ones(golden, tmp_path, kind):
    """Weights that were multiplied by their scales beforehand give the same."""
    config, weights, io = golden
    path = comfy_file(tmp_path / "umt5.safetensors", weights, kind)
    tensors, scales = read_umt5(config, path)
    by_block = lambda scale: scale.repeat_interleave(8, 0).repeat_interleave(8, 1)  # noqa: E731
    times = {name: by_block(scale) if kind == "int8 by block" else scale for name, scale in scales.items()}
    whole = {name: tensor.float() * times.get(name, 1) for name, tensor in tensors.items()}
    expected = load_strict(lambda: build_umt5(config), whole, where="golden")
    found = encoded(load_umt5(config, path, CPU, None), io)
    torch.testing.assert_close(found, encoded(expected, io), rtol=1e-4, atol=1e-5)


def test_fp8_without_scales_under_the_released_names_and_with_a_narrow_embedding(golden, tmp_path):
    """As `umt5-xxl-enc-fp8_e4m3fn.safetensors`, whose weights were only cast."""
    config, weights, io = golden
    cast = {name: tensor.to(FP8) if tensor.ndim == 2 else tensor.bfloat16() for name, tensor in weights.items()}
    save_file(cast, tmp_path / "umt5.safetensors")
    assert error_of(encoded(load_umt5(config, tmp_path / "umt5.safetensors", CPU, None), io), io) < 0.2


@pytest.fixture
def comfy_model(random_model, tmp_path) -> Path:
    """A copy of the config that names a text encoder in fp8 and the VAE in 16 bits, as ComfyUI has them."""
    config, data = load_config(random_model), yaml.safe_load(random_model.read_text())
    text, vae = data["text_encoder_cfg"], data["vae_cfg"]
    data["checkpoint_path"] = str(config.path(data["checkpoint_path"]))
    text["tokenizer_path"] = str(config.path(text["tokenizer_path"]))
    whole = read_tensors(config.path(text["checkpoint_path"]))
    text["checkpoint_path"] = str(comfy_file(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", whole, "fp8"))
    halves = {name: tensor.half() for name, tensor in read_tensors(config.path(vae["vae_pth"])).items()}
    vae["vae_pth"] = str(tmp_path / "wan_2.1_vae.safetensors")
    save_file(halves, vae["vae_pth"])
    (tmp_path / "comfy.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "comfy.yaml"


def test_a_film_from_comfyuis_files(random_model, comfy_model, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    worlds = [infworld.load(path, "cpu") for path in (comfy_model, random_model)]
    (chunk,), (expected,) = (world.rollout(picture, "right 80", "a hill", 81, seed=1) for world in worlds)
    error = (chunk.latents - expected.latents).norm() / expected.latents.norm()
    assert 0 < error < 0.2 and chunk.frames.shape == expected.frames.shape


def test_the_whole_encoder_is_loaded_from_such_a_file(random_model, comfy_model):
    hidden, expected = (
        load_text_encoder(load_config(path), "cpu", torch.float32).encode(["a red house"]).hidden
        for path in (comfy_model, random_model)
    )
    assert 0 < (hidden - expected).norm() < 0.2 * expected.norm()


# ------------------------------------------------------------------------------------------------------ what is refused

Q = "encoder.block.0.layer.0.SelfAttention.q"


def as_bytes(**recipe) -> Tensor:
    return torch.tensor(list(json.dumps(recipe).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": None}, f"the scale of {Q}.weight is .* of no weight"),
        ({"scale_weight": torch.ones(3)}, rf"the scale of {Q}.weight is \(3,\), of a weight"),
        ({"weight": torch.zeros(8, 8, dtype=torch.int8), "scale_weight": None}, "int8 without a scale"),
        ({"weight": torch.zeros(8, 8, dtype=torch.uint8)}, "uint8 without a scale"),
        ({"bogus": torch.ones(1)}, "1 extra: block.0.layer.0.SelfAttention.q.bogus"),
        ({"comfy_quant": as_bytes(format="nvfp4")}, "nvfp4.*not known here"),
        ({"comfy_quant": as_bytes(format="int8_tensorwise", convrot=True)}, "convrot.*not known here"),
        ({"comfy_quant": torch.ones(3, dtype=torch.uint8)}, "not known here"),
    ],
)
def test_what_cannot_be_read_rightly_is_refused(golden, tmp_path, changes, message):
    path = comfy_file(tmp_path / "umt5.safetensors", golden[1], "fp8")
    tensors = {**load_file(path), **{f"{Q}.{name}": tensor for name, tensor in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=message):
        read_umt5(golden[0], tmp_path / "bad.safetensors")


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])])
def test_a_scale_of_one_number_may_have_any_shape(scale):
    weights, scales = split_scales({"a.weight": torch.tensor([[2.0, -4.0]]).to(FP8), "a.scale_weight": scale}, "here")
    assert widen(weights["a.weight"], scales["a.weight"], torch.float32).tolist() == [[1.0, -2.0]]


def test_a_widened_module_keeps_nothing_wide():
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    layer.weight = nn.Parameter(torch.eye(4).to(torch.int8), requires_grad=False)
    module = Widened(layer, torch.float32, {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0])})
    assert module(torch.ones(1, 4)).tolist() == [[1.0, 2.0, 3.0, 4.0]] and layer.weight.dtype == torch.int8
