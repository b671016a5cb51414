"""LoRAs are merged as they are loaded, strictly by name and shape, and travel over the Hub with a card."""

import dataclasses
import json

import pytest
import torch
from hub_server import TOKEN, HubServer, connect
from safetensors.torch import save_file

import infworld
from infworld import hub, transfer
from infworld.checkpoint import read_tensors
from infworld.cli import download, generate, upload
from infworld.config import load_config
from infworld.lora import Lora, LoraChoice, merge, save
from infworld.models import with_loras

LAYERS = {  # of the small model: (outputs, inputs and kernel)
    "blocks.0.self_attn.q": (48, 48),
    "latent_encoder.conv_in": (32, 16, 3, 3, 3),
    "action_encoder.encode_1.0": (16, 16, 3),
}
RANK, ALPHA = 2, 4.0


def matrices(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random A and B for a weight of this shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    ones = [1] * (len(shape) - 2)
    a = torch.randn(RANK, *shape[1:], generator=generator)
    return a.half().float(), torch.randn(shape[0], RANK, *ones, generator=generator).half().float()


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "place.safetensors"
    save(path, {layer: matrices(*shape) for layer, shape in LAYERS.items()}, {"model": "small", "alpha": str(ALPHA)})
    return path


@pytest.mark.parametrize("text", ["place.safetensors", "place.safetensors:0.5", "place.safetensors:-2", "me/place:1.5"])
def test_a_choice_is_read_back(text):
    assert str(LoraChoice.parse(text)) == text


@pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:nan", "a.safetensors:", "me/place:inf"])
def test_a_weight_is_a_finite_number(text):
    with pytest.raises(ValueError, match="weight of the LoRA"):
        LoraChoice.parse(text)


def test_loading_merges(small_model, lora):
    """A weight w of a LoRA adds w alpha / rank B A to each of its layers, and nothing to others."""
    config = load_config(small_model)
    plain = infworld.load(config, "cpu").transformer.state_dict()
    merged = infworld.load(with_loras(config, [f"{lora}:0.5", f"{lora}:0.25"]), "cpu").transformer.state_dict()
    changed = {name for name, tensor in plain.items() if not torch.equal(tensor, merged[name])}
    assert changed == {f"{layer}.weight" for layer in LAYERS}
    for layer, shape in LAYERS.items():
        a, b = matrices(*shape)
        expected = plain[f"{layer}.weight"] + 0.75 * ALPHA / RANK * torch.einsum("or...,ri...->oi...", b, a)
        torch.testing.assert_close(merged[f"{layer}.weight"], expected)


def test_a_config_may_name_its_loras(small_model, lora, tmp_path):
    """As a run of training writes it: the LoRA beside the YAML."""
    for file in small_model.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "small.yaml"
    path.write_text(path.read_text() + "loras: ['place.safetensors:0.5']\n")
    config = load_config(path)
    assert config.loras == ("place.safetensors:0.5",)
    expected = infworld.load(with_loras(load_config(small_model), [f"{lora}:0.5"]), "cpu").transformer.state_dict()
    for name, tensor in infworld.load(config, "cpu").transformer.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_names_of_other_programs_fit_too(lora, tmp_path):
    for prefix in ("base_model.model.", "diffusion_model."):
        path = tmp_path / "other.safetensors"
        save_file({prefix + name: tensor for name, tensor in read_tensors(lora).items()}, path)
        other = Lora.load(path)
        assert other.layers.keys() == LAYERS.keys() and other.model == "" and other.alpha is None
        a, b = matrices(48, 48)
        torch.testing.assert_close(other.change("blocks.0.self_attn.q"), b @ a)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"blocks.7.self_attn.q.lora_A.weight": (2, 48)}, "no blocks.7.self_attn.q.lora_B.weight"),
        ({"blocks.0.self_attn.q.weight": (48, 48)}, "has blocks.0.self_attn.q.weight: a LoRA has"),
        (
            {"blocks.7.self_attn.q.lora_A.weight": (2, 48), "blocks.7.self_attn.q.lora_B.weight": (48, 2)},
            "changes blocks.7.self_attn.q.weight, which the model 'small' does not have",
        ),
        (
            {"blocks.0.self_attn.q.lora_A.weight": (2, 64), "blocks.0.self_attn.q.lora_B.weight": (64, 2)},
            r"blocks.0.self_attn.q.weight of \(64, 64\), and that of the model 'small' is \(48, 48\)",
        ),
        (
            {"blocks.0.self_attn.q.lora_A.weight": (2, 48), "blocks.0.self_attn.q.lora_B.weight": (48, 3)},
            "lora_B .*: no product",
        ),
    ],
)
def test_what_does_not_fit_is_named(small_model, tmp_path, tensors, message):
    path = tmp_path / "wrong.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=message):
        merge(read_tensors(small_model.parent / "world.safetensors"), [LoraChoice(str(path))], "small")


def test_a_lora_of_another_model_says_whose_it_is(lora):
    tensors = {f"{layer}.weight": torch.zeros(shape) for layer, shape in LAYERS.items()}
    tensors["blocks.0.self_attn.q.weight"] = torch.zeros(64, 64)
    with pytest.raises(ValueError, match=r"model 'other' is \(64, 64\) \(it was made for 'small'\)"):
        merge(tensors, [LoraChoice(str(lora))], "other")


def test_generate_merges_and_names_the_lora_to_go_on_with(small_model, picture, lora, tmp_path, monkeypatch, capsys):
    loaded, load = [], infworld.load
    monkeypatch.setattr(infworld, "load", lambda config, *args, **options: loaded.append(config) or load(config, *args))
    common = ["--image", picture, "--model", small_model, "--frames", 81, "--session", tmp_path / "s.safetensors"]
    arguments = [*common, "--out", tmp_path / "film.mp4", "--lora", f"{lora}:0.5"]
    assert generate.main([str(argument) for argument in arguments]) == 0
    assert loaded[0].loras == (f"{lora}:0.5",)
    assert f"--lora {lora}:0.5" in capsys.readouterr().out
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([{"image": str(picture), "out": str(tmp_path / "again.mp4")}]))
    arguments = ["--jobs", jobs, "--model", small_model, "--frames", 81, "--lora", lora]
    assert generate.main([str(argument) for argument in arguments]) == 0
    assert loaded[1].loras == (str(lora),)
    assert generate.main([str(argument) for argument in [*arguments[:-1], tmp_path / "none.safetensors"]]) == 2
    assert "no weight file at" in capsys.readouterr().err and len(loaded) == 2


def test_the_page_starts_with_a_lora(small_model, lora):
    from infworld.app.model_pool import ModelPool
    from infworld.app.server import choose_models

    models = ModelPool(choose_models(str(small_model), "cpu", None, [str(lora)]), "cpu")
    assert models.config("small").loras == (str(lora),)
    weight = models.world("small").transformer.blocks[0].self_attn.q.weight
    assert not torch.equal(weight, infworld.load(small_model, "cpu").transformer.blocks[0].self_attn.q.weight)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "sleep", lambda seconds: None)
    monkeypatch.setenv("INFWORLD_CHECKPOINTS", str(tmp_path / "weights"))
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def test_a_lora_goes_to_the_hub_and_comes_back(server, lora, small_model, tmp_path, capsys):
    assert upload.main(["somebody/place", "--lora", str(lora)]) == 0
    files = server.repos["somebody/place"].files
    assert files["lora.safetensors"] == lora.read_bytes()
    assert b"--lora somebody/place" in files["README.md"] and b"| alpha | 4.0 |" in files["README.md"]
    server.repos["somebody/place"].commit({"README.md": b"my own words"})
    assert upload.main(["somebody/place", "--lora", str(lora)]) == 0
    assert server.repos["somebody/place"].files["README.md"] == b"my own words"

    assert download.main(["--lora", "somebody/place"]) == 0
    assert "for small, 3 layers" in capsys.readouterr().out
    config = with_loras(load_config(small_model), ["somebody/place:0.5"])
    (found,) = map(LoraChoice.parse, config.loras)
    assert found.weight == 0.5 and Lora.load(found.source).layers.keys() == LAYERS.keys()
    asked = len(server.requests)
    assert with_loras(load_config(small_model), ["somebody/place:0.5"]).loras == config.loras
    assert len(server.requests) == asked  # it is here


def test_a_repository_without_one_lora_is_an_error(server, tmp_path):
    server.repo("somebody/many", {"a.safetensors": b"a", "b.safetensors": b"b"})
    with pytest.raises(hub.HubError, match="has 2 .safetensors files"):
        hub.fetch_lora("somebody/many")


def test_what_is_no_lora_is_not_uploaded(server, small_model, capsys):
    assert upload.main(["somebody/place", "--lora", str(small_model.parent / "world.safetensors")]) == 2
    assert "a LoRA has" in capsys.readouterr().err and "somebody/place" not in server.repos


def test_a_config_keeps_its_loras_when_it_is_written(small_model):
    from infworld.config import ModelConfig, from_dict, to_dict

    config = dataclasses.replace(load_config(small_model), loras=("a.safetensors:0.5",))
    assert from_dict(ModelConfig, to_dict(config), "again").loras == config.loras
