"""A model of a few thousand random weights: everything is real about it but what it has learned."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

# Before torch is imported, here and in the programs that tests start: tests run side by side, a thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from servers import CHROMIUM_FLAGS, free_port

from infworld.checkpoint import save_tensors
from infworld.config import ModelConfig, from_dict

SMALL_MODEL = {
    "name": "small",
    "checkpoint_path": "world.safetensors",
    "amp_dtype": "float32",  # whatever this CPU can do
    "text_encoder_cfg": {
        "type": "bytes",
        "checkpoint_path": "text.safetensors",
        "model_max_length": 16,
        "vocab": 257,
        "dim": 16,
        "dim_ffn": 32,
        "num_heads": 2,
        "num_layers": 1,
    },
    "val_scheduler_cfg": {"shift": 3.0, "num_sampling_steps": 2, "text_cfg_scale": 1.0},
    "model_cfg": {
        "dim": 48,
        "ffn_dim": 96,
        "freq_dim": 32,
        "num_heads": 4,
        "num_layers": 2,
        "caption_channels": 16,
        "memory_hidden_dim": 32,
        "memory_num_heads": 2,
        "action_embed_dim": 8,
        "action_hidden_dim": 16,
    },
    "vae_cfg": {"vae_pth": "vae.safetensors", "dim": 4},
    "validation_data": {"live_lengths": [8, 16, 24]},
    "buckets": [[32, 48], [48, 32]],
}


# The same with the text encoder of the released model, and guidance.
SMALL_UMT5_MODEL = {
    **SMALL_MODEL,
    "name": "small-umt5",
    "text_encoder_cfg": {
        "type": "umt5",
        "model_max_length": 32,
        "vocab": 800,
        "dim": 64,
        "dim_attn": 64,
        "dim_ffn": 128,
        "num_heads": 4,
        "num_layers": 2,
    },
    "val_scheduler_cfg": {"shift": 3.0, "num_sampling_steps": 2, "text_cfg_scale": 5.0},
    "model_cfg": {**SMALL_MODEL["model_cfg"], "caption_channels": 64},
    "vae_cfg": {"dim": 4},
}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Nothing is remembered from one test run to the next, or in a person's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        for name in ("INFWORLD_MODEL", "TORCH_HOME"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """Path of the config of a small model whose files have the released names and formats. Not to be changed."""
    from infworld.cli.random_checkpoint import make

    folder = tmp_path_factory.mktemp("random_model")
    return make(folder, from_dict(ModelConfig, SMALL_UMT5_MODEL, "SMALL_UMT5_MODEL"))


def make_small_model(folder: Path, model: dict[str, Any] = SMALL_MODEL) -> Path:
    """Writes a config and random weights for it; returns the path that `infworld.load` takes."""
    from infworld.dit import InfiniteWorldTransformer
    from infworld.text import ByteTextEncoder
    from infworld.vae import build_vae

    config = from_dict(ModelConfig, model, "model")
    torch.manual_seed(0)
    parts = {
        config.checkpoint_path: InfiniteWorldTransformer(config.model_cfg),
        config.vae_cfg.vae_pth: build_vae(config.vae_cfg),
        config.text_encoder_cfg.checkpoint_path: ByteTextEncoder(config.text_encoder_cfg),
    }
    for name, module in parts.items():
        save_tensors(folder / name, module.state_dict())
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(model), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """Path of the small model's config; its weights lie beside it."""
    return make_small_model(tmp_path_factory.mktemp("small_model"))


@pytest.fixture(scope="session")
def world(small_model):
    import infworld

    return infworld.load(small_model, device="cpu")


def with_sampler(world, **changes):
    """The same World but for some of its sampler's settings."""
    from infworld.world import World

    sampler = dataclasses.replace(world.config.val_scheduler_cfg, **changes)
    own = World(dataclasses.replace(world.config, val_scheduler_cfg=sampler), world.transformer, world.vae, None)
    own._encode_texts = world._encode_texts
    return own


@pytest.fixture(scope="session")
def picture(tmp_path_factory) -> Path:
    """A PNG of 96 x 64 pixels with something in every corner."""
    y, x = np.mgrid[0:64, 0:96]
    pixels = np.stack([x * 255 // 95, y * 255 // 63, (x + y) % 256], axis=-1).astype(np.uint8)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium or Chrome; tests that need one are skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next((found for found in map(shutil.which, names) if found), None)
    if path is None:
        pytest.skip("no Chromium on PATH")
    return path


@pytest.fixture(scope="module")
def browser(chromium):
    """A real browser, which takes longer to start than most tests. Not for the session: it holds an event loop."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def films(tmp_path_factory) -> Path:
    """The films' folder of `address`."""
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="session")
def address(serve, films) -> str:
    """The page for the small model, for all tests that need none of their own: building one takes seconds."""
    return serve(films)


@pytest.fixture(scope="session")
def serve(world, serve_models):
    """Starts the page for the small model in this process: serve(films folder) -> its address, with a slash."""
    return lambda films: serve_models(world, films)


@pytest.fixture(scope="session")
def serve_models():
    """The same for any models: serve_models(what server.serve takes, films folder) -> address."""
    from infworld.app import server

    pages = []

    def start(models, films: Path, hall=None) -> str:
        where = {"server_name": "127.0.0.1", "server_port": free_port()}
        page = server.serve(models, films, hall=hall, prevent_thread_lock=True, quiet=True, **where)
        pages.append(page)
        return page.local_url

    yield start
    for page in pages:
        page.close()
