"""The released weights: found on this machine, or downloaded from the Hub. `loading` loads them.

Files are looked for where the config says, then in the folder of `weights_folder`, then in the Hub's cache, where
`preload_from_hub` puts them when a Space is built. What is missing is downloaded to `weights_folder`: `checkpoints/`
in a clone, because that is where the config and a person look; else a folder below HF_HOME, which is the user's own and
which a Space's persistent storage keeps. Nothing is downloaded to the Hub's cache, but files that are
there are used, so that none is stored twice.

The first download of a repository resolves `main` to one commit and records it in `.hub.json` beside the files;
later and resumed downloads use that commit. `revision` or INFWORLD_REVISION choose
another one of the main repository. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean to
huggingface_hub.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants

from infworld.config import INSTALLED, PROJECT_ROOT, ModelConfig, faster_form
from infworld.transfer import (
    NETWORK_ERRORS,
    PAUSES,
    TIMEOUT,
    HubError,
    HubFile,
    RetryPolicy,
    Transfer,
    TransferProgress,
    check_space,
    download,
    explain,
    explained_disk,
    is_same,
    locked,
)

log = logging.getLogger(__name__)

REPO = "MeiGen-AI/Infinite-World"
FALLBACK_REPO = "Wan-AI/Wan2.1-T2V-1.3B"  # has the same VAE, text encoder and tokenizer
TOKENIZER = "tokenizer"
TOKENIZER_SUFFIXES = (".json", ".model", ".txt")
RECORD = ".hub.json"
LORA_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class DownloadPlan:
    """What a `fetch` does: the config as it will be, with absolute paths, and the files to download for it."""

    config: ModelConfig
    files: tuple[HubFile, ...]
    damages: tuple[str, ...] = ()  # descriptions of damaged files


def weights_folder() -> Path:
    """Where downloaded weights go: INFWORLD_CHECKPOINTS; else `checkpoints/` in a clone; else a folder below HF_HOME.

    A Space is a clone whose files are lost when it restarts, so it downloads below HF_HOME too.
    """
    if named := os.environ.get("INFWORLD_CHECKPOINTS"):
        return Path(named).expanduser().absolute()
    if INSTALLED or os.environ.get("SPACE_ID"):
        return Path(constants.HF_ASSETS_CACHE, "infworld", "hub", "checkpoints")
    return PROJECT_ROOT / "checkpoints"


def find(config: ModelConfig) -> ModelConfig | None:
    """The config with absolute paths if every file that it names is on this machine, else None.

    Only looks at names: fast, without network or torch. `check` looks into the files.
    """
    places = {key: _locate(config, key, name, weights_folder()) for key, name in _named(config).items()}
    return _placed(config, places) if all(places.values()) else None


def fetch(
    config: ModelConfig,
    progress: Callable[[Transfer], None] | None = None,
    *,
    revision: str | None = None,
    to: str | Path | None = None,
) -> ModelConfig:
    """The config with absolute paths, after what is missing or damaged has been downloaded and all was checked.

    progress: called a few times per second; an exception from it stops the download, which can be resumed.
    revision: commit, tag or branch of the main repository (None: INFWORLD_REVISION, else the commit that was
    downloaded before, else `main` of today). to: folder to download to (None: `weights_folder()`).
    Raises HubError for failures of the Hub, the network or the disk, ValueError for files that do not fit the config.
    """
    folder = _folder(to)
    todo = plan(config, revision=revision, to=folder)
    if todo.files:
        with locked(folder):
            todo = plan(config, revision=revision, to=folder)  # another process may have downloaded them meanwhile
            for damage in todo.damages:
                log.warning("%s", damage)
            check_space(todo.files)
            _write_record(folder, {file.repo: file.commit for file in todo.files})
            meter = TransferProgress(todo.files, progress)
            for file in todo.files:
                download(file, meter)
    check(todo.config)
    return todo.config


def plan(config: ModelConfig, *, revision: str | None = None, to: str | Path | None = None) -> DownloadPlan:
    """What `fetch` would download with these arguments; asks the Hub if anything is missing. Raises the same errors.

    A damaged file counts as missing, and so does a file whose content differs from a revision that is given.
    """
    folder = _folder(to)
    revision = revision or os.environ.get("INFWORLD_REVISION") or None
    named = _named(config)
    places = {key: _locate(config, key, name, folder) for key, name in named.items()}
    damages = {key: damage for key, place in places.items() if place and (damage := _damage(key, place))}
    hub = _Listings(_read_record(folder) | ({REPO: revision} if revision else {}))
    files = []
    for key, name in named.items():
        place = places[key]
        if place and not revision and key not in damages:
            continue
        # Where it is now, it would be found first next time too. The cache belongs to the client, though, and what
        # was converted to another format has another name.
        stays = place is not None and not _is_cached(place) and place.name == Path(name).name
        target = place if place and stays else _target(name, folder)
        try:
            listed = hub.files(key, name, target)
        except HubError as error:
            why = damages.get(key, "" if place else f"{name} is not on this machine")
            raise HubError(f"{why}. {error}" if why else str(error)) from error
        if (
            place
            and key not in damages
            and all(is_same(_inside(place, key, file), file.size, file.digest) for file in listed)
        ):
            continue
        files += [file for file in listed if not is_same(file.target, file.size, file.digest)]
        places[key] = target
    return DownloadPlan(_placed(config, places), tuple(files), tuple(damages.values()))


def check(config: ModelConfig) -> None:
    """Compares names and shapes of all tensors with the modules, and loads the tokenizer; reads no tensor's bytes.

    config: with paths as `find` and `fetch` give them. Raises ValueError or FileNotFoundError and names the file.
    """
    # Imported here because torch and transformers take seconds, and finding the files needs neither.
    from infworld.checkpoint import RELEASED_EXTRAS, load_strict
    from infworld.dit import InfiniteWorldTransformer
    from infworld.text import ByteTextEncoder, read_umt5
    from infworld.vae import build_vae

    text = config.text_encoder_cfg
    builders = {
        "transformer": lambda: InfiniteWorldTransformer(config.model_cfg),
        "vae": lambda: build_vae(config.vae_cfg),
        "text": lambda: ByteTextEncoder(text),
    }
    for key, name in _named(config).items():
        path = config.path(name)
        content = _read(key, path)
        if key == "text" and text.type == "umt5":
            read_umt5(text, path)
        elif key in builders:
            drop = RELEASED_EXTRAS if key == "transformer" else ()
            load_strict(builders[key], content, where=path, device="meta", drop=drop)


# LoRAs


def is_repository(name: str) -> bool:
    """Whether a name could be USER/NAME of the Hub, by its form."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not name.endswith(LORA_SUFFIX)


def fetch_lora(repo: str, progress: Callable[[Transfer], None] | None = None) -> Path:
    """The LoRA of a repository, which is downloaded to `weights_folder()` if it is not there; asks nothing if it is.

    Raises HubError as `fetch` does, and for a repository without a LoRA or with several.
    """
    folder = weights_folder() / "loras"
    target = folder / f"{repo.replace('/', '--')}{LORA_SUFFIX}"
    if target.is_file():
        return target
    commit, entries = _Listings({}).listing(repo)
    names = [name for name in entries if name.endswith(LORA_SUFFIX)]
    if len(names) != 1:
        raise HubError(f"{repo} has {len(names)} {LORA_SUFFIX} files and not one LoRA: download the right one yourself")
    file = HubFile(repo, commit, names[0], *entries[names[0]], target)
    with locked(folder):
        check_space([file])
        download(file, TransferProgress([file], progress))
    return target


# Where the files of a config are


def _named(config: ModelConfig) -> dict[str, str]:
    """The file or folder that the config names for each of its parts. Raises ValueError for an empty one."""
    text = config.text_encoder_cfg
    named = {
        "transformer": config.checkpoint_path,
        "vae": config.vae_cfg.vae_pth,
        "text": text.checkpoint_path,
        TOKENIZER: text.tokenizer_path,
    }
    if text.type != "umt5":
        del named[TOKENIZER]
    if empty := [key for key, name in named.items() if not name]:
        raise ValueError(f"{config.source or config.name} names no file for the {empty[0]}: complete it")
    return named


def _placed(config: ModelConfig, places: Mapping[str, Path | None]) -> ModelConfig:
    text: dict[str, Any] = {"checkpoint_path": str(places["text"])}
    if TOKENIZER in places:
        text["tokenizer_path"] = str(places[TOKENIZER])
    return dataclasses.replace(
        config,
        checkpoint_path=str(places["transformer"]),
        vae_cfg=dataclasses.replace(config.vae_cfg, vae_pth=str(places["vae"])),
        text_encoder_cfg=dataclasses.replace(config.text_encoder_cfg, **text),
    )


def _locate(config: ModelConfig, key: str, name: str, folder: Path) -> Path | None:
    """Where the part is on this machine: as the config says, in the folder, in the Hub's cache, or None."""
    for place in (config.path(name), faster_form(_target(name, folder))):
        if _is_there(key, place):
            return place.absolute()
    for repo in (REPO, FALLBACK_REPO):
        snapshots = _cache() / f"models--{repo.replace('/', '--')}" / "snapshots"
        newest_first = sorted(snapshots.glob("*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
        for snapshot in newest_first:
            paths = (path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())
            if matches := _match(key, name, paths):
                place = snapshot / matches[0]
                place = place.parent if key == TOKENIZER else place
                if _is_there(key, place):
                    return place
    return None


def _is_there(key: str, place: Path) -> bool:
    """A tokenizer folder is complete if its config is there, the last file in order of names and so of a download."""
    return (place / "tokenizer_config.json" if key == TOKENIZER else place).is_file()


def _match(key: str, name: str, paths: Iterable[str]) -> list[str]:
    """The files of a repository that a config's name stands for: those whose paths have the longest common ending.

    The repositories keep the same files in different folders: `models/google/umt5-xxl/` here, `google/umt5-xxl/` there.
    """
    wanted = PurePosixPath(name.replace("\\", "/")).parts

    def in_common(path: str) -> int:
        parts = PurePosixPath(path).parts[: -1 if key == TOKENIZER else None]
        pairs = zip(reversed(parts), reversed(wanted), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    if key == TOKENIZER:
        paths = (path for path in paths if path.endswith(TOKENIZER_SUFFIXES))
    common = {path: in_common(path) for path in paths}
    most = max(common.values(), default=0)
    found = sorted(path for path, count in common.items() if count == most) if most else []
    return found if key == TOKENIZER else sorted(found, key=len)[:1]


def _target(name: str, folder: Path) -> Path:
    """Where a missing part is downloaded to: where an absolute name says, else below `folder`."""
    path = Path(name).expanduser()
    if path.is_absolute():
        return path
    return folder.joinpath(*(path.parts[1:] if path.parts[0] == "checkpoints" else path.parts))


def _inside(place: Path, key: str, file: HubFile) -> Path:
    return place / file.target.name if key == TOKENIZER else place


def _folder(to: str | Path | None) -> Path:
    return Path(to).expanduser().absolute() if to else weights_folder()


def _cache() -> Path:
    return Path(constants.HF_HUB_CACHE)


def _is_cached(place: Path) -> bool:
    return _cache().absolute() in place.absolute().parents


def _read(key: str, path: Path):
    """The tensors of a file, mapped and not read, or the tokenizer. Raises ValueError for a damaged one."""
    from infworld.checkpoint import read_tensors
    from infworld.text import load_tokenizer

    return load_tokenizer(path) if key == TOKENIZER else read_tensors(path)


def _damage(key: str, path: Path) -> str | None:
    try:
        _read(key, path)
    except ValueError as error:
        return str(error)
    return None


# What the Hub has


class _Listings:
    """The repositories' files at one commit each, listed once when first needed.

    revisions: by repository; the others are taken at the current `main`.
    """

    def __init__(self, revisions: dict[str, str]):
        self._revisions = revisions
        self._known: dict[str, tuple[str, dict]] = {}

    def files(self, key: str, name: str, target: Path) -> list[HubFile]:
        """The files of a part, from the first repository that has it. Raises HubError if none does."""
        for repo in (REPO, FALLBACK_REPO):
            commit, entries = self.listing(repo)
            if paths := _match(key, name, entries):
                return [
                    HubFile(
                        repo, commit, path, *entries[path], target / Path(path).name if key == TOKENIZER else target
                    )
                    for path in paths
                ]
        raise HubError(
            f"neither {REPO} nor {FALLBACK_REPO} has {PurePosixPath(name).name}: put it at {target} yourself, or "
            f"correct its path in the config"
        )

    def listing(self, repo: str) -> tuple[str, dict[str, tuple[int, str]]]:
        """The commit, and size and digest of every file."""
        if repo not in self._known:
            revision = self._revisions.get(repo)
            patience = RetryPolicy(lambda error: explain(error, repo, revision), PAUSES[:2])
            while True:
                try:
                    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
                    break
                except NETWORK_ERRORS as error:
                    patience.wait(error)
            log.info("%s is taken at commit %s", repo, info.sha)
            entries = {
                entry.rfilename: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
                for entry in info.siblings or []
            }
            self._known[repo] = (str(info.sha), entries)
        return self._known[repo]


def _read_record(folder: Path) -> dict[str, str]:
    """The commit of each repository that files in this folder came from."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {repo: commit for repo, commit in record.items() if repo in (REPO, FALLBACK_REPO)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise HubError(f"cannot read {folder / RECORD}: {error}; delete it") from error


def _write_record(folder: Path, commits: dict[str, str]) -> None:
    if commits:
        text = json.dumps(_read_record(folder) | commits, indent=1)
        with explained_disk(folder):
            (folder / RECORD).write_text(text + "\n", encoding="utf-8")
