"""The weights on their way from the Hub: huggingface_hub's real client against a server on this machine."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SMALL_MODEL
from hub_server import LFS_SIZE, TOKEN, HubServer, Repo, connect
from huggingface_hub import constants
from safetensors.torch import load_file

from infworld import hub, transfer
from infworld.cli import download
from infworld.cli.console import INTERRUPTED
from infworld.config import PROJECT_ROOT, ModelConfig, from_dict, load_config
from infworld.dit import InfiniteWorldTransformer
from infworld.transfer import HubError
from infworld.vae import build_vae

GOLDEN = Path(__file__).parent / "golden"
TRANSFORMER, VAE, TEXT = "checkpoints/small_world.ckpt", "checkpoints/models/Small_VAE.pth", "checkpoints/models/t5.pth"
TOKENIZER = "checkpoints/models/google/small-umt5"


def released_like() -> dict:
    """A config as the released one is, with tiny sizes and names that no real checkpoint has."""
    sizes = json.loads((GOLDEN / "config.json").read_text())["t5"]
    del sizes["shared_pos"]
    data = copy.deepcopy(SMALL_MODEL)
    data["checkpoint_path"], data["vae_cfg"]["vae_pth"] = TRANSFORMER, VAE
    data["model_cfg"]["caption_channels"] = sizes["dim"]
    data["text_encoder_cfg"] = {
        **sizes,
        **{"type": "umt5", "checkpoint_path": TEXT, "tokenizer_path": TOKENIZER, "model_max_length": 16},
    }
    return data


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> dict[str, bytes]:
    """Files in the released formats, by their names in the main repository, with some that nobody needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("released")
    config = from_dict(ModelConfig, released_like(), "released_like")
    torch.manual_seed(0)
    weights = {
        TRANSFORMER: {"state_dict": InfiniteWorldTransformer(config.model_cfg).state_dict()},
        VAE: build_vae(config.vae_cfg).state_dict(),
        TEXT: load_file(GOLDEN / "t5_weights.safetensors"),
    }
    for name, content in weights.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / TOKENIZER)
    base = folder / "checkpoints"
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    return {**files, "README.md": b"read me", "assets/film.mp4": bytes(LFS_SIZE), "models/google/picture.png": b"p"}


@pytest.fixture
def server(released, tmp_path, monkeypatch):
    """The Hub with both repositories; nothing on this machine is touched but `tmp_path`, and no time is waited."""
    monkeypatch.setenv("INFWORLD_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setattr(transfer, "sleep", lambda seconds: None)
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        server.repo(hub.REPO, released)
        server.repo(hub.FALLBACK_REPO, {name.removeprefix("models/"): content for name, content in released.items()})
        yield server


@pytest.fixture
def config(tmp_path) -> ModelConfig:
    folder = tmp_path / "project" / "configs"
    folder.mkdir(parents=True)
    (folder / "small.yaml").write_text(yaml.safe_dump(released_like()))
    return load_config(folder / "small.yaml")


def put(folder: Path, released: dict[str, bytes], *names: str) -> None:
    """Lays the named released files below a folder, all of them if none is named."""
    for name in names or released:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(released[name])


def inside(folder: Path) -> list[str]:
    """The files below a folder that a person sees."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


NEEDED = [
    "models/Small_VAE.pth",
    "models/google/small-umt5/tokenizer.json",
    "models/google/small-umt5/tokenizer_config.json",
    "models/t5.pth",
    "small_world.ckpt",
]


def test_only_the_files_needed_are_downloaded_and_then_found(server, config, released, tmp_path):
    assert hub.find(config) is None
    fetched = hub.fetch(config)
    assert inside(tmp_path / "checkpoints") == NEEDED
    assert Path(fetched.checkpoint_path).read_bytes() == released["small_world.ckpt"]
    assert hub.find(config) == fetched
    before = len(server.requests)
    assert hub.fetch(config) == fetched
    assert len(server.requests) == before, "what is there needs no network"


def test_what_was_downloaded_makes_a_model(server, config, tmp_path):
    import infworld

    hub.fetch(config)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "project" / "checkpoints")
    assert infworld.load(config.source, device="cpu").config.name == "small"


def test_the_fallback_gives_what_the_main_repository_lacks(server, config, released, tmp_path):
    server.repo(hub.REPO, {"small_world.ckpt": released["small_world.ckpt"]})
    hub.fetch(config)
    assert inside(tmp_path / "checkpoints") == NEEDED
    taken = [request.path for request in server.requests if "/resolve/" in request.path]
    assert sum(path.startswith(f"/{hub.FALLBACK_REPO}") for path in taken) == 4


def test_the_fallback_is_not_asked_where_the_main_repository_has_all(server, config):
    hub.fetch(config)
    assert not [request for request in server.requests if hub.FALLBACK_REPO in request.path]


def test_a_file_that_no_repository_has_is_named(server, config):
    lost = dataclasses.replace(config, checkpoint_path="checkpoints/mine.ckpt")
    with pytest.raises(HubError, match=r"neither .* nor .* has mine.ckpt: put it at .*mine.ckpt yourself"):
        hub.fetch(lost)
    nameless = dataclasses.replace(config, checkpoint_path="")
    with pytest.raises(ValueError, match="small.yaml names no file for the transformer"):
        hub.find(nameless)


# Taking up again


def test_a_cut_connection_is_taken_up_where_it_broke(server, config, released):
    size = len(released["small_world.ckpt"])
    server.cut["small_world.ckpt"] = [size // 3, size // 3]
    hub.fetch(config)
    answers = server.asked("small_world.ckpt")
    answers = [request for request in answers if request.path.startswith("/cdn/")]
    assert [request.range for request in answers] == [
        *("bytes=0-", f"bytes={size // 3}-", f"bytes={2 * (size // 3)}-")
    ], "each answer asks for the rest alone"
    assert sum(request.sent for request in answers) == size, "no byte comes twice"


def test_a_download_that_died_goes_on_in_another_process(server, config, released, tmp_path, monkeypatch):
    """What huggingface_hub 2.4 does not do: its own temporary file goes when its process does."""
    size = len(released["small_world.ckpt"])

    class Killed(Exception):
        pass

    def kill(progress: hub.Transfer) -> None:
        if progress.done >= size // 4:
            raise Killed

    monkeypatch.setattr(transfer, "_REPORT_EVERY", 0)
    with pytest.raises(Killed):
        hub.fetch(config, kill)
    (part,) = (tmp_path / "checkpoints").glob(".small_world.ckpt.*.part")
    have = part.stat().st_size
    assert 0 < have < size
    assert hub.find(config) is None, "half a file is not found"

    script = (
        "import os, sys; from infworld import hub; from infworld.config import load_config; "
        "print(hub.fetch(load_config(sys.argv[1])).checkpoint_path)"
    )
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "PYTHONPATH": str(PROJECT_ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", script, config.source], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert server.asked("small_world.ckpt")[-1].range == f"bytes={have}-"
    assert (tmp_path / "checkpoints/small_world.ckpt").read_bytes() == released["small_world.ckpt"]
    assert not part.exists()


def test_a_server_without_ranges_costs_time_and_no_correctness(server, config, released):
    server.ranges = False
    server.cut["small_world.ckpt"] = [len(released["small_world.ckpt"]) // 2]
    assert Path(hub.fetch(config).checkpoint_path).read_bytes() == released["small_world.ckpt"]


def test_a_connection_that_never_gives_a_byte_is_given_up(server, config):
    server.cut["small_world.ckpt"] = [0] * 20
    with pytest.raises(HubError, match=r"cannot reach .*check the connection.*what has arrived is kept"):
        hub.fetch(config)
    assert len(server.cut["small_world.ckpt"]) == 20 - 1 - len(transfer.PAUSES)


# Revisions


def test_a_download_stays_with_the_commit_that_it_began_with(server, config, released, tmp_path):
    repo: Repo = server.repos[hub.REPO]
    first = repo.head
    server.status["t5.pth"] = [(404, {})]
    with pytest.raises(HubError):
        hub.fetch(config)
    repo.commit({"small_world.ckpt": b"another" * 1000, "models/t5.pth": b"another" * 1000})
    hub.fetch(config)
    assert json.loads((tmp_path / "checkpoints/.hub.json").read_text()) == {hub.REPO: first}
    assert (tmp_path / "checkpoints/models/t5.pth").read_bytes() == released["models/t5.pth"]


def test_a_pinned_revision_replaces_only_what_differs(server, config, released, tmp_path, monkeypatch):
    hub.fetch(config)
    weights = torch.load(tmp_path / "checkpoints/models/Small_VAE.pth")
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "other.pth")
    other = (tmp_path / "other.pth").read_bytes()
    second = server.repos[hub.REPO].commit({"models/Small_VAE.pth": other})
    assert hub.plan(config).files == ()
    monkeypatch.setenv("INFWORLD_REVISION", second)
    assert [file.path for file in hub.plan(config).files] == ["models/Small_VAE.pth"]
    hub.fetch(config)
    assert (tmp_path / "checkpoints/models/Small_VAE.pth").read_bytes() == other
    assert json.loads((tmp_path / "checkpoints/.hub.json").read_text()) == {hub.REPO: second}


def test_an_unknown_revision_is_named(server, config):
    with pytest.raises(HubError, match="has no revision nosuch: choose one of"):
        hub.fetch(config, revision="nosuch")


# What is there already


def test_files_in_the_clients_cache_are_used_and_not_stored_again(server, config, released, tmp_path):
    """As `preload_from_hub` lays them down when a Space is built: snapshots of links to blobs."""
    from huggingface_hub import snapshot_download

    snapshot_download(hub.REPO, cache_dir=constants.HF_HUB_CACHE, allow_patterns=["*.ckpt", "models/*"])
    found = hub.find(config)
    assert Path(found.checkpoint_path).parent.parent.name == "snapshots"
    assert hub.fetch(config) == found
    assert not (tmp_path / "checkpoints").exists()


def test_only_what_is_missing_is_downloaded(server, config, released, tmp_path):
    put(tmp_path / "checkpoints", released, "small_world.ckpt", "models/t5.pth")
    put(tmp_path / "project/checkpoints", released, "models/Small_VAE.pth")
    hub.fetch(config)
    assert sorted(Path(r.path).name for r in server.requests if "/resolve/" in r.path) == [
        *("tokenizer.json", "tokenizer_config.json")
    ]


def test_a_space_keeps_its_download_below_hf_home(monkeypatch, tmp_path):
    monkeypatch.delenv("INFWORLD_CHECKPOINTS", raising=False)
    assert hub.weights_folder() == PROJECT_ROOT / "checkpoints"
    monkeypatch.setenv("SPACE_ID", "somebody/space")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "data/assets"))
    assert tmp_path / "data" in hub.weights_folder().parents


def test_an_installed_package_keeps_its_download_below_hf_home(monkeypatch, tmp_path):
    monkeypatch.delenv("INFWORLD_CHECKPOINTS", raising=False)
    monkeypatch.setattr(hub, "INSTALLED", True)
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "data/assets"))
    assert tmp_path / "data" in hub.weights_folder().parents
    assert not (tmp_path / "data").exists(), "nothing is written before there is a download"


def test_finding_needs_no_torch():
    script = "import sys; from infworld import hub, config; hub.find(config.load_config('tiny')); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert "infworld.hub" in run.stdout.split()
    assert not {"torch", "transformers"} & set(run.stdout.split())


# Damage


def test_bytes_that_changed_on_the_way_are_noticed_and_removed(server, config, tmp_path):
    server.corrupt.add("t5.pth")
    with pytest.raises(HubError, match=r"t5\.pth arrived damaged or changed .* was removed: run the same again"):
        hub.fetch(config)
    assert not list((tmp_path / "checkpoints").rglob("*t5.pth*"))
    server.corrupt.clear()
    hub.fetch(config)


def test_a_small_file_is_checked_by_its_hash_too(server, config):
    server.corrupt.add("tokenizer_config.json")
    with pytest.raises(HubError, match=r"tokenizer_config\.json arrived damaged"):
        hub.fetch(config)


@pytest.mark.parametrize("name", ["small_world.ckpt", "models/Small_VAE.pth", "models/t5.pth"])
def test_half_a_file_is_noticed_and_downloaded_again(name, server, config, released, tmp_path, caplog):
    put(tmp_path / "checkpoints", released)
    path = tmp_path / "checkpoints" / name
    path.write_bytes(released[name][: len(released[name]) // 2])
    with caplog.at_level(logging.WARNING):
        hub.fetch(config)
    assert path.read_bytes() == released[name]
    assert f"{path} is truncated" in caplog.text
    assert [Path(r.path).name for r in server.requests if "/resolve/" in r.path] == [path.name]


def test_half_a_file_without_network_is_named(server, config, released, tmp_path, monkeypatch):
    put(tmp_path / "checkpoints", released)
    path = tmp_path / "checkpoints/models/t5.pth"
    path.write_bytes(released["models/t5.pth"][:-1000])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"t5\.pth is truncated.*HF_HUB_OFFLINE is set"):
        hub.fetch(config)
    assert path.is_file(), "a person's file is not removed"


def test_a_truncated_file_of_11_gb_is_noticed_at_once(server, config, released, tmp_path):
    put(tmp_path / "checkpoints", released)
    path = tmp_path / "checkpoints/models/t5.pth"
    with path.open("r+b") as file:
        file.truncate(11_361_920_418)  # sparse: takes no room
    begin = time.monotonic()
    assert [file.path for file in hub.plan(config).files] == ["models/t5.pth"]
    assert time.monotonic() - begin < 30  # reading it would take minutes


def test_a_broken_tokenizer_is_downloaded_again(server, config, released, tmp_path):
    put(tmp_path / "checkpoints", released)
    (tmp_path / TOKENIZER / "tokenizer.json").write_text("{")
    hub.fetch(config)
    assert [Path(r.path).name for r in server.requests if "/resolve/" in r.path] == ["tokenizer.json"]


def test_a_file_of_another_model_is_kept_and_its_tensors_named(server, config, released, tmp_path):
    put(tmp_path / "checkpoints", released)
    path = tmp_path / "checkpoints/models/Small_VAE.pth"
    torch.save({"conv1.weight": torch.zeros(3)}, path)
    mine = path.read_bytes()
    with pytest.raises(ValueError, match=r"Small_VAE\.pth does not fit the model.*missing"):
        hub.fetch(config)
    assert path.read_bytes() == mine
    assert not server.requests


def test_a_file_that_is_not_as_listed_is_refused(server, config, released):
    server.status[f"/{hub.REPO}/resolve"] = [(302, {"Location": f"{server.url}/{hub.REPO}/raw"})]
    server.status[f"/{hub.REPO}/raw"] = [(200, {})]
    with pytest.raises(HubError, match=r"has 27 bytes, not .* as listed: it changed, or a proxy"):
        hub.fetch(config)


# Converted files


def test_a_converted_file_stands_in_for_its_original(server, config, released, tmp_path):
    names = [name for name in NEEDED if name != "models/t5.pth"]
    put(tmp_path / "checkpoints", released, *names)
    converted = tmp_path / "checkpoints/models/t5.safetensors"
    shutil.copy(GOLDEN / "t5_weights.safetensors", converted)
    assert hub.find(config).text_encoder_cfg.checkpoint_path == str(converted)
    assert hub.fetch(config) == hub.find(config)
    assert not server.requests


def test_a_damaged_converted_file_gives_way_to_a_new_download(server, config, released, tmp_path):
    put(tmp_path / "checkpoints", released, *(name for name in NEEDED if name != "models/t5.pth"))
    converted = tmp_path / "checkpoints/models/t5.safetensors"
    converted.write_bytes((GOLDEN / "t5_weights.safetensors").read_bytes()[:-100])
    placed = hub.fetch(config)
    assert placed.text_encoder_cfg.checkpoint_path == str(tmp_path / "checkpoints/models/t5.pth")
    assert hub.find(config) == placed, "the newer one of the two is taken"


# Refusals


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (401, {}, "is private, not there, or the token is not valid.*hf auth login"),
        (401, {"X-Error-Code": "GatedRepo"}, "asks for permission: accept its terms at"),
        (403, {}, "asks for permission"),
        (404, {"X-Error-Code": "RepoNotFound"}, "is not there: check the name, HF_ENDPOINT"),
        (429, {"Retry-After": "900"}, "asks to slow down: try again in 900 s"),
        (429, {"RateLimit": '"api";r=0;t=301'}, "asks to slow down: try again in 301 s"),
        (503, {}, r"has trouble \(status 503\).*try again later"),
    ],
)
@pytest.mark.parametrize("where", ["/api/models/", "/resolve/"])
def test_a_refusal_says_what_to_do_and_never_the_token(where, status, headers, message, server, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    server.status[where] = [(status, headers)] * 20
    with pytest.raises(HubError, match=message) as refusal:
        hub.fetch(config)
    assert TOKEN not in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert server.requests[-1].token == f"Bearer {TOKEN}", "the token is used"


def test_a_hub_that_asks_to_slow_down_is_waited_for(server, config, monkeypatch):
    pauses = []
    monkeypatch.setattr(transfer, "sleep", pauses.append)
    server.status["/api/models/"] = [(429, {"Retry-After": "7"})]
    server.status["small_world.ckpt"] = [(429, {"RateLimit": '"resolvers";r=0;t=11'}), (502, {})]
    hub.fetch(config)
    assert pauses[0] == 7
    assert sorted(pauses[1:]) == [2, 11]


def test_the_token_is_not_sent_to_the_storage(server, config, monkeypatch):
    """The Hub redirects large files to another host."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.fetch(config)
    assert {request.token for request in server.requests if request.path.startswith("/cdn/")} == {None}
    assert {request.token for request in server.requests if "/resolve/" in request.path} == {f"Bearer {TOKEN}"}


def test_offline_is_said_and_needs_no_server(server, config, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="out of reach while HF_HUB_OFFLINE is set: unset it, or put the files"):
        hub.fetch(config)
    assert not server.requests


def test_no_server_is_said(server, config, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(
        HubError,
        match=r"is not on this machine\. cannot reach http://127\.0\.0\.1.*check the connection, proxy and HF_ENDPOINT",
    ):
        hub.fetch(config)


# The disk


def test_room_is_checked_before_anything_is_downloaded(server, config, released, monkeypatch):
    free = transfer.ROOM + 1000
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(HubError, match=r"are still to be downloaded to .*: free .* there, or .*INFWORLD_CHECKPOINTS"):
        hub.fetch(config)
    assert not [request for request in server.requests if "/resolve/" in request.path]


def test_only_what_is_still_missing_needs_room(server, config, released, tmp_path, monkeypatch):
    put(tmp_path / "checkpoints", released, *(name for name in NEEDED if name != "small_world.ckpt"))
    (file,) = hub.plan(config).files
    file.part.write_bytes(released["small_world.ckpt"][:-500])
    free = transfer.ROOM + 500
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    hub.fetch(config)


def test_a_disk_that_fills_up_meanwhile_is_said_and_the_part_kept(server, config, monkeypatch, tmp_path):
    def full(self, arrived):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(transfer.TransferProgress, "add", full)
        with pytest.raises(HubError, match=r"cannot write to .*No space left on device.*free space"):
            hub.fetch(config)
    assert list((tmp_path / "checkpoints").glob(".*.part"))
    hub.fetch(config)


# From the command line


def test_the_script_lists_downloads_and_says_what_next(server, config, tmp_path, capsys):
    model = ("--model", str(config.source))
    assert download.main([*model, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NEEDED)
    assert "5 files, 3 MB to download" in listed
    assert not (tmp_path / "checkpoints").exists()

    assert download.main([*model, "--to", str(tmp_path / "elsewhere")]) == 0
    assert inside(tmp_path / "elsewhere") == NEEDED
    said = capsys.readouterr().out
    assert "small is complete, and its tensors fit" in said
    assert f"start it with: INFWORLD_CHECKPOINTS={tmp_path / 'elsewhere'} infworld serve --model" in said
    before = len(server.requests)
    assert download.main([*model, "--to", str(tmp_path / "elsewhere"), "--dry-run"]) == 0
    assert "everything is there" in capsys.readouterr().out
    assert len(server.requests) == before


def test_the_script_says_errors_in_one_line(server, config, monkeypatch, capsys):
    assert download.main(["--model", str(config.source), "--revision", "nosuch"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    missing = f"error: {config.checkpoint_path} is not on this machine. "
    assert said[0].startswith(f"{missing}{hub.REPO} has no revision nosuch")

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(transfer.TransferProgress, "add", stop)
    assert download.main(["--model", str(config.source)]) == INTERRUPTED
    assert "run the same again to go on" in capsys.readouterr().err


# Progress


def test_progress_counts_all_files_together_and_goes_up(server, config):
    seen = []
    planned = sum(file.size for file in hub.plan(config).files)
    hub.fetch(config, seen.append)
    assert {transfer.total for transfer in seen} == {planned}
    assert [transfer.done for transfer in seen] == sorted(transfer.done for transfer in seen)
    assert seen[-1].done == planned
    text = str(hub.Transfer("a.pth", 1_200_000_000, 14_900_000_000, 85_000_000.0, 161.2))
    assert text == "a.pth: 1.2 GB of 14.9 GB, 85 MB/s, 2:41 left"
