"""Imaging and aesthetic quality and LPIPS: the real networks with random weights, under the names looked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from infworld.cli import evaluate
from infworld.metrics import networks
from infworld.metrics.networks import find_networks

CPU = torch.device("cpu")
CLIP_CONFIG = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty folder of torch.hub, and an empty cache of the Hub beside it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "torch" / "hub"
    for name in ("pyiqa", "checkpoints"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.fixture
def aesthetic(hub):
    """Weights for the aesthetic quality: of a small CLIP, and a predictor that says 5.5 of everything."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**CLIP_CONFIG, image_size=32, patch_size=16, projection_dim=768)
    )
    cached = hub.parent.parent / "hub" / f"models--{networks.CLIP.replace('/', '--')}"
    clip.save_pretrained(cached / "snapshots" / "0123")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123")
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.tensor([5.5])}, hub / networks.AESTHETIC)
    return clip


def frames(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_networks_that_are_not_here_are_named_and_not_fetched(hub):
    found = find_networks(CPU)
    assert str(found) == "none"
    assert found.missing.keys() == {"imaging quality", "aesthetic quality", "LPIPS"}
    assert networks.AESTHETIC in found.missing["aesthetic quality"]
    assert found.quality(frames(2)) == found.lpips(frames(2), frames(2)) == {}
    assert not [path for path in hub.rglob("*") if path.is_file()]


def test_a_predictor_without_its_clip_says_so(aesthetic, monkeypatch):
    monkeypatch.setattr(networks, "CLIP", "openai/another")
    assert find_networks(CPU).missing["aesthetic quality"] == "openai/another is not in the Hub's cache"


def test_weights_that_are_others_are_refused_by_name(aesthetic, hub):
    torch.save(nn.Linear(512, 1).state_dict(), hub / networks.AESTHETIC)
    with pytest.raises(ValueError, match="sa_0_4_vit_l_14_linear.pth"):
        find_networks(CPU)
    (hub / networks.AESTHETIC).write_bytes(b"<html>")
    with pytest.raises(ValueError, match="sa_0_4_vit_l_14_linear.pth"):
        find_networks(CPU)


def test_aesthetic_quality_is_a_linear_function_of_what_clip_sees(aesthetic, hub):
    assert find_networks(CPU).quality(frames(9))["aesthetic quality"] == pytest.approx(55)
    weight = torch.randn(1, 768, generator=torch.Generator().manual_seed(0))
    torch.save({"weight": weight, "bias": torch.zeros(1)}, hub / networks.AESTHETIC)
    pictures = frames(9, 32, 32)  # as large as this CLIP takes them
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (networks.CLIP_MEAN, networks.CLIP_DEVIATION))
    with torch.inference_mode():
        pixels = (torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / deviation
        seen = aesthetic.eval()(pixel_values=pixels).image_embeds
    expected = (seen @ weight[0] / seen.norm(dim=-1)).mean() / 10
    assert find_networks(CPU).quality(pictures)["aesthetic quality"] == pytest.approx(100 * float(expected), abs=1e-3)


def test_the_middle_of_a_wide_picture_is_judged():
    wide = torch.zeros(1, 3, 48, 96)
    wide[..., 24:72] = 1
    assert networks._square(wide, 24)[..., 1:-1].min() > 0.9
    assert networks._square(wide.mT, 24).shape == (1, 3, 24, 24)


def test_imaging_quality_is_pyiqas_musiq(hub):
    pyiqa = pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install 'infworld[quality]'")
    from pyiqa.archs.musiq_arch import MUSIQ

    torch.save(MUSIQ(pretrained=False).state_dict(), hub / networks.MUSIQ)
    pictures = frames(10)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255
    musiq = pyiqa.create_metric("musiq-spaq", device=CPU, pretrained_model_path=str(hub / networks.MUSIQ))
    expected = musiq(pixels).mean()
    found = find_networks(CPU)
    assert found.quality(pictures)["imaging quality"] == pytest.approx(float(expected), abs=1e-4)
    assert found.found["imaging quality"](torch.rand(1, 3, 90, 600)).shape == (1,)  # wider than 512 is made smaller


def test_lpips_tells_pictures_apart(hub):
    pytest.importorskip("pyiqa", reason="pyiqa is not installed: pip install 'infworld[quality]'")
    from pyiqa.archs.lpips_arch import LPIPS
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), hub / networks.ALEXNET)
    assert networks.LPIPS_LAYERS in find_networks(CPU).missing["LPIPS"]
    tensors = LPIPS(pretrained=False).state_dict()
    torch.save(
        {name: value.abs() for name, value in tensors.items() if name.startswith("lin")}, hub / networks.LPIPS_LAYERS
    )
    found = find_networks(CPU)
    first, second = frames(10), 255 - frames(10)
    assert found.lpips(first, first) == {"LPIPS": 0}
    assert found.lpips(first, second)["LPIPS"] > 0
    (hub / networks.ALEXNET).unlink()
    assert networks.ALEXNET in find_networks(CPU).missing["LPIPS"]


def test_an_evaluation_uses_what_is_here_and_says_what_is_not(aesthetic, small_model, picture, tmp_path, capsys):
    cases = tmp_path / "cases"
    cases.mkdir()
    (cases / "cases.json").write_text(json.dumps([{"name": "a", "picture": str(picture), "actions": "right 80"}]))
    arguments = ["--model", str(small_model), "--device", "cpu", "--cases", str(cases), "--quick"]
    arguments += ["--whole-memory-only", "--out", str(tmp_path / "report")]
    assert evaluate.main(arguments) == 0
    assert "imaging quality is left out: pyiqa" in capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["settings"]["networks"] == "aesthetic quality"
    assert {row["measure"]: row for row in report["figures"]}["aesthetic quality"]["whole"]["mean"] == pytest.approx(55)
    html = (tmp_path / "report" / "report.html").read_text()
    assert "aesthetic quality (LAION&#39;s predictor, as VBench)" in html
    assert "Left out: imaging quality (pyiqa" in html and "aesthetic quality (pyiqa" not in html
    (tmp_path / "torch" / "hub" / networks.AESTHETIC).unlink()
    assert evaluate.main(arguments) == 2  # films that are measured have what the others would lack
    assert "other settings (networks)" in capsys.readouterr().err
