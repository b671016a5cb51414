"""Starts the page: `python app.py`, `infworld serve`.

`--model` or INFWORLD_MODEL name the model; its weights are downloaded if they are not there. Without a choice it is
the released one where its weights are and a GPU that it fits on (24 GB), else the small one that comes along.
Several devices make as many films at once, one each: `--device gpus`, `--device cuda:0,cuda:2`, INFWORLD_DEVICE. All
GPUs make one film at a time, each film sooner, with `torchrun --nproc-per-node N app.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import gradio as gr
import spaces  # noqa: F401  (patches torch on a ZeroGPU Space, so before anything touches CUDA)
import torch
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from infworld import parallel
from infworld.app.compute import follow
from infworld.app.films import FilmStore
from infworld.app.folders import own_folder
from infworld.app.guard import LOOPBACK, Guard, Stored
from infworld.app.model_pool import ModelPool, SingleModelPool
from infworld.app.modules import read_static
from infworld.app.page import Page
from infworld.app.runner import MAX_WAITING, Runner
from infworld.app.studio import Studio
from infworld.app.sweeper import Sweeper, forget_closed_pages
from infworld.arena.hall import Hall
from infworld.config import ModelConfig
from infworld.devices import pick_device
from infworld.layers import fastest_attention
from infworld.models import available, default_model, prepare, with_loras
from infworld.world import World

LIFETIME = 2 * 3600  # seconds that a film is kept after the last change to it
UPLOADS_LIFETIME = 12 * 3600  # seconds after they were last used
UPLOAD_ROOM = 100 * 2**20  # bytes of an upload that any model allows: enough for every picture that is accepted
# Events that Gradio has going at once, as each run that waits is one: far above what the runner lets wait.
MAX_EVENTS = 2 * MAX_WAITING
MAX_SESSIONS = 256  # pages whose state is kept, the last used: Gradio holds up to a megabyte for each
CLOSED_LIFETIME = 300  # seconds that the state of a closed page is kept after its last event
UPLOADS = 10  # times the largest upload: all uploads together
UPLOADS_OF_ONE = 3  # times the largest upload: of one address between two sweeps
MAX_OPEN_FILES = 65_536


def serve(
    models: ModelPool | World | Sequence[ModelPool],
    films: Path | None = None,
    allow_hosts: Sequence[str] = (),
    hall: Hall | None = None,
    **launching: Any,
) -> gr.Blocks:
    """Builds and launches the page for one or more models, on one or more devices (a pool each, of the same models);
    films go below `films`, by default a folder of this user's own. allow_hosts: names that the server answers to
    besides this machine's own. hall: the arena to add as another page. Returns the running page; its
    `close` waits for the step that is being computed."""
    if isinstance(models, World):
        models = SingleModelPool(models)
    pools = [models] if isinstance(models, ModelPool) else models
    models = pools[0]
    store = FilmStore(films or own_folder("films"), LIFETIME, models.config(models.first).validation_data.fps)
    runner = Runner(*pools)
    blocks = Page(Studio(models, store), runner).blocks()
    blocks.workers.callback(runner.close)
    if hall is not None:
        from infworld.app.arena_page import add_arena  # needs the extra "arena"

        add_arena(blocks, hall)

    largest = max(upload_limit(models.config(name)) for name in models.names)
    stored = Stored(UPLOADS * largest, UPLOADS_OF_ONE * largest)

    def swept(removed: set[str], size: int) -> None:
        for known in blocks.temp_file_sets:
            known.difference_update(removed)
        stored.reset(size)
        if blocks.is_running:
            forget_closed_pages(blocks.state_holder, CLOSED_LIFETIME)

    sweeper = Sweeper(store, Path(get_upload_folder()), UPLOADS_LIFETIME, runner.films, swept)
    sweeper.start()
    blocks.workers.callback(sweeper.stop)
    guard = Middleware(
        Guard,
        hosts=hosts_of(launching.get("server_name"), allow_hosts),
        upload=largest + 2**20,
        stored=stored,
        connections=raise_open_files() // 2,
    )
    blocks.launch(
        theme=theme(),
        css=read_static("page.css"),
        allowed_paths=[str(store.root), *([str(hall.stage)] if hall else [])],
        max_file_size=largest,
        app_kwargs={"middleware": [guard]},
        max_threads=MAX_EVENTS,
        state_session_capacity=MAX_SESSIONS,
        mcp_server=importlib.util.find_spec("mcp") is not None,
        ssr_mode=False,
        footer_links=["api", "settings"],
        **launching,
    )
    if not launching.get("prevent_thread_lock"):
        blocks.close(verbose=False)
    return blocks


def hosts_of(server_name: str | None, allowed: Sequence[str]) -> set[str] | None:
    """The names that a server answers to; None for all, where it listens to other machines and was told none."""
    name = server_name or os.environ.get("GRADIO_SERVER_NAME", LOOPBACK[1])
    return {*LOOPBACK, name, *allowed} if allowed or name in LOOPBACK else None


def raise_open_files() -> int:
    """As many open files and connections as this process may have; returns how many."""
    if importlib.util.find_spec("resource") is None:  # Windows
        return MAX_OPEN_FILES
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else soft


def upload_limit(config: ModelConfig) -> int:
    """Bytes: the largest session file of the longest film, and some room.

    A session holds all latents, twice, and what the VAE's encoder carries on: 15 to 20 numbers a channel and (folded)
    pixel.
    """
    pixels = math.prod(config.largest_bucket)
    carried = 20 * pixels // config.vae_cfg.fold**2 * config.vae_cfg.dim
    latents = 2 * config.validation_data.max_chunks * config.chunk_latents * config.vae_cfg.z_dim
    latents *= pixels // config.vae_cfg.space**2
    return UPLOAD_ROOM + 4 * (carried + latents)


def theme() -> gr.Theme:
    """Fonts of the system, so that the page needs nothing from elsewhere."""
    return gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="The page on which a picture becomes a walk.")
    parser.add_argument(
        "--model",
        help="infinite-world, tiny, or the path of a YAML file; missing weights are downloaded. Default: "
        "INFWORLD_MODEL, else infinite-world if its weights are here and a GPU that it fits on, else tiny",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="a LoRA to merge into that model, a .safetensors file or USER/NAME of the Hub; may be given several times",
    )
    parser.add_argument(
        "--device",
        default=os.environ.get("INFWORLD_DEVICE") or "auto",
        help="auto, cpu or cuda; several make as many films at once, one each: gpus for all GPUs of this machine, or "
        "names as cuda:0,cuda:2 (default: INFWORLD_DEVICE, else auto)",
    )
    parser.add_argument("--host", help="address to listen on: 0.0.0.0 for all (default: only this machine)")
    parser.add_argument("--port", type=port, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that the server answers to, as that of a proxy before it (default: localhost and 127.0.0.1; with "
        "--host 0.0.0.0 all)",
    )
    parser.add_argument(
        "--arena",
        type=Path,
        default=os.environ.get("INFWORLD_ARENA") or None,
        metavar="FILMS",
        help="add the arena for these films (docs/measuring.md; default: INFWORLD_ARENA, else none)",
    )
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    host = f"[{args.host}]" if args.host and ":" in args.host and not args.host.startswith("[") else args.host
    launching = {"server_name": host, "server_port": args.port, "allow_hosts": args.allow_host}
    try:
        devices = [parallel.device_of_rank(name) for name in device_names(args.device)]
        first = pick_device(devices[0])
        with open_arena(args.arena) as hall, parallel.join_team(first) as team:
            if team and len(devices) > 1:
                raise ValueError(f"torchrun's processes make one film on a device each: not --device {args.device}")
            configs = choose_models(args.model, devices[0], team, args.lora)
            pools = [ModelPool(configs, device, team) for device in devices]
            if team and not team.is_rank0:
                follow(team, pools[0].world)
                return
            # The order of attention's backends is the process's: no thread may put it back while another one films.
            with fastest_attention(first) if len(devices) > 1 else nullcontext():
                serve(pools, hall=hall, **launching)
            if team:
                team.end()
    except (ValueError, OSError) as error:
        parser.error(str(error))


def device_names(text: str) -> list[str]:
    """The devices that `--device` asks for. Raises ValueError for "gpus" where there are none."""
    if text != "gpus":
        return text.split(",")
    if not torch.cuda.is_available():
        raise ValueError("--device gpus: torch sees no GPU here; use auto or cpu")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def open_arena(films: Path | None) -> AbstractContextManager[Hall | None]:
    """The arena for a folder of films, if there shall be one."""
    if films is None:
        return nullcontext()
    from infworld.app.arena_page import open_hall  # needs the extra "arena"

    return open_hall(films)


def port(text: str) -> int:
    """A port's number. Raises ValueError."""
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port: use 1 to 65535")
    return number


def choose_models(
    name: str | None, device: str, team: parallel.Team | None, loras: Sequence[str] = ()
) -> dict[str, ModelConfig]:
    """The models that are here, the one of this name or the default one first, with LoRAs; it may be downloaded."""

    def first() -> ModelConfig:
        return with_loras(prepare(name or default_model(device)), loras)

    config = first() if team is None else team.broadcast_from_rank0(first)
    others = {name: other for name, other in available().items() if name != config.name}
    return {config.name: config, **others}


if __name__ == "__main__":
    main()
