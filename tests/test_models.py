"""Which model runs when nobody says, and what it takes to have it here."""

from types import SimpleNamespace

import pytest
import torch

from infworld import devices, hub, models
from infworld.config import load_config

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "memory", "capability", "expected"),
    [
        (GPU, 80, (9, 0), True),
        (GPU, 23.6, (8, 6), True),  # what is left of 24 GB
        (GPU, 16, (8, 9), False),
        (GPU, 32, (7, 0), False),
        (torch.device("cpu"), 80, (9, 0), False),
    ],
)
def test_the_released_model_fits_24_gb_with_bfloat16(monkeypatch, device, memory, capability, expected):
    properties = SimpleNamespace(total_memory=int(memory * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert models.fits(device) == expected


@pytest.mark.parametrize(
    ("variable", "fits", "there", "expected"),
    [
        (None, True, True, "infinite-world"),
        (None, True, False, "tiny"),  # nothing is downloaded without being asked for
        (None, False, True, "tiny"),
        ("", True, True, "infinite-world"),
        ("infinite-world", False, False, "infinite-world"),
        ("mine.yaml", True, True, "mine.yaml"),
    ],
)
def test_without_a_choice_it_is_the_best_that_runs_here(monkeypatch, variable, fits, there, expected):
    monkeypatch.setattr(models, "fits", lambda device: fits)
    monkeypatch.setattr(hub, "find", lambda config: config if there else None)
    if variable is not None:
        monkeypatch.setenv("INFWORLD_MODEL", variable)
    assert models.default_model("cpu") == expected


def test_what_is_here_is_not_asked_for_elsewhere(monkeypatch, random_model):
    monkeypatch.setattr(hub, "fetch", None)
    config = models.prepare(random_model)
    assert config.checkpoint_path == str(random_model.parent / "infinite_world_model.ckpt")
    assert "tiny" in models.available()


def test_what_is_missing_is_downloaded_and_shown(monkeypatch, capsys):
    def fetch(config, progress):
        progress(hub.Transfer("world.ckpt", 1_000_000, 5_000_000))
        progress(hub.Transfer("world.ckpt", 5_000_000, 5_000_000))
        return config

    monkeypatch.setattr(hub, "find", lambda config: None)
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert models.prepare("infinite-world") == load_config("infinite-world")
    assert "world.ckpt" in (shown := capsys.readouterr().err) and "5.00M/5.00M" in shown


def test_a_model_that_is_none_is_named():
    with pytest.raises(ValueError, match="unknown model 'huge'"):
        models.prepare("huge")


def test_peak_memory_is_at_least_what_is_held(monkeypatch):
    held = torch.ones(2**25)  # 134 MB
    words = devices.peak_memory(torch.device("cpu"))
    assert float(words.removeprefix("CPU ").removesuffix(" GB")) > held.nbytes / 1e9
