"""Puts this project on the Hub: a model repository, or with --space a Gradio Space; with --lora a LoRA alone. Run it
again: it goes on.

python scripts/upload_to_hf.py USER/NAME --space --hardware zero-a10g

What git ignores stays here, and so does what looks like a secret; `checkpoints/` is git-ignored and goes up all the
same. A Space leaves the released weights out unless --released-weights says otherwise: it finds them on the Hub.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, SpaceHardware, constants, get_token
from huggingface_hub.errors import LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from infworld import lora
from infworld.checkpoint import SUFFIXES
from infworld.cli.console import exit_code
from infworld.config import INSTALLED, PROJECT_ROOT, faster_form
from infworld.hub import REPO, TOKENIZER_SUFFIXES
from infworld.models import RELEASED
from infworld.transfer import NETWORK_ERRORS, RetryPolicy, explain, hash_like, is_same, size_text, status_of

COMMIT_FILES, COMMIT_BYTES = 50, 2_000_000_000  # per commit: what a cut connection can cost
CARD = "README.md"
STARTERS = (CARD, "app.py", "requirements.txt")  # what makes a Space start
SPACE_BYTES = 1_000_000_000  # what the repository of a Space holds for free
NOT_OURS = ("outputs", ".git", ".venv*", "venv", "__pycache__", ".pytest_cache", ".ruff_cache", ".gradio", ".cache")
SECRET_NAMES = (
    *(".env", ".env.*", ".netrc", ".git-credentials", ".huggingface", "*.pem", "*.key", "id_rsa*", "id_ed25519*"),
    *("token", "*.token", "*_token", "*token.txt", "stored_tokens", "credentials*", "secrets*"),
)
HARDWARE_HELP = "what the Space runs on: zero-a10g, l40sx1, a100-large, ...; without it, what the account gives"
TOKEN_TEXT = re.compile(rb"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}")
SEARCHED_BYTES = 10_000_000  # larger files are weights or films


class UploadError(OSError):
    """Why nothing, or not all, was uploaded; the message names the way out."""


@dataclass(frozen=True)
class Upload:
    """One file and its name in the repository. content: in place of the file's own, where that differs."""

    path: Path
    name: str
    content: bytes | None = None

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.content is None else len(self.content)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    return exit_code(lambda: upload(args), "stopped; run the same again to go on")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Upload this project to the Hugging Face Hub.")
    parser.add_argument("repo", nargs="?", default=os.environ.get("HF_REPO_ID"), metavar="USER/NAME")
    parser.add_argument("--space", action="store_true", help="a Gradio Space that runs, in place of a model repository")
    parser.add_argument(
        "--hardware", choices=[flavor.value for flavor in SpaceHardware], metavar="FLAVOR", help=HARDWARE_HELP
    )
    parser.add_argument("--lora", type=Path, metavar="FILE", help="upload this LoRA with a card, and nothing else")
    parser.add_argument("--private", action="store_true", help="only for you, where the repository is new")
    parser.add_argument(
        "--released-weights",
        action=argparse.BooleanOptionalAction,
        help="upload what is in checkpoints/ beside the tiny model; default: yes for a model, no for a Space",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list the files; needs no token and no network")
    args = parser.parse_args(arguments)
    if not args.repo:
        parser.error("name the repository: USER/NAME, or set HF_REPO_ID")
    if args.hardware and not args.space:
        parser.error("--hardware is of a Space: add --space")
    if args.lora and (args.space or args.released_weights):
        parser.error("--lora uploads a LoRA alone, to a model repository")
    if args.released_weights is None:
        args.released_weights = not args.space
    return args


def upload(args: argparse.Namespace) -> int:
    """Uploads what `args` ask for; returns the exit code. What cannot work fails before the first byte goes."""
    left_out: dict[str, str] = {}
    if args.lora:
        files = lora_and_card(args.lora, args.repo)
    elif INSTALLED:
        raise UploadError("an installed package is not the whole project: upload from a clone of its repository")
    else:
        files, left_out = project_files(PROJECT_ROOT, args.released_weights)
    show(files, left_out, args)
    if holders := [file.name for file in files if holds_token(file)]:
        raise UploadError(f"{holders[0]} holds what looks like a Hub token: take it out, nothing is uploaded before")
    if args.dry_run:
        return 0
    api = HfApi()
    repo = owned_repo(api, args.repo)
    kind = "space" if args.space else "model"
    page = f"{api.endpoint}/{'spaces/' if args.space else ''}{repo}"
    try:
        make_repo(api, repo, kind, args)
        there = on_hub(api, repo, kind)
        kept = {CARD} & there.keys() if args.lora else set()  # it may have been edited there
        files = [file for file in files if file.name not in kept]
        missing = [file for file in files if not is_there(file, there)]
        print(f"{page} has {len(files) - len(missing)} of {len(files)} files")
        send(api, repo, kind, missing, page)
        there = on_hub(api, repo, kind)
    except NETWORK_ERRORS as error:
        raise UploadError(refusal(error, page)) from error
    if lost := [file.name for file in files if there.get(file.name, (None,))[0] != file.size]:
        raise UploadError(f"the Hub did not take {len(lost)} files: {', '.join(lost[:4])}; see its .gitignore")
    print(f"complete: {page}")
    return 0


# What goes up


def lora_and_card(path: Path, repo: str) -> list[Upload]:
    """A LoRA's file and its card. Raises FileNotFoundError or ValueError for a file that is none."""
    found = lora.Lora.load(path)
    base = REPO if found.model == RELEASED else ""
    return [Upload(path, "lora.safetensors"), Upload(path, CARD, lora.card(found, repo, base).encode())]


def project_files(root: Path, released_weights: bool) -> tuple[list[Upload], dict[str, str]]:
    """The files to upload, in order, and why others, by name, are left out though git does not ignore them.

    `.gitignore` goes first, because the Hub refuses what the one it has ignores; the files that make a Space start
    go last, so that it does not before it is complete.
    """
    names = [name for name in listed_by_git(root) if os.path.lexists(root / name) and is_ours(root, name)]
    weights = [name for name in weights_in(root / "checkpoints", root) if name not in names] if released_weights else []
    followed = {name.split("/")[0] for name in weights}  # `checkpoints`, which may be a link to a folder itself
    reasons = {name: why_left_out(root, name) for name in names + weights if name not in followed}
    reasons = {name: reason for name, reason in reasons.items() if reason}
    kept = [name for name in names + weights if name not in reasons and (root / name).is_file()]
    files = [Upload(root / name, name) for name in kept]
    if weights:
        files = [without_checkpoints(file) if file.name == ".gitignore" else file for file in files]
    return sorted(files, key=lambda file: (file.name in STARTERS, file.name != ".gitignore", file.name)), reasons


def why_left_out(root: Path, name: str) -> str | None:
    """Why a file does not go up although it would: a secret, a link to somewhere else, a name that the Hub cannot have.

    A link may lead to another file of the project, and out of it only to a folder, below `checkpoints/`.
    """
    path, target = root / name, Path(os.path.realpath(root / name))
    try:
        name.encode()
    except UnicodeEncodeError:
        return "as its name is not UTF-8"
    if is_secret(name) or is_secret(target.name):
        return "as it may be a secret"
    if not path.is_symlink():
        return None
    if not target.is_file():
        return "as it is a link to a folder or to nothing"
    if not target.is_relative_to(root.resolve()):
        return "as it is a link to a file outside of the project: copy it here if it shall go"
    inside = target.relative_to(root.resolve()).as_posix()
    return None if is_ours(root, inside) else "as it is a link to a file that stays here"


def listed_by_git(root: Path) -> list[str]:
    """Names of all files below `root` that git does not ignore, whether or not it is a repository itself."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], capture_output=True, check=True, cwd=root)
        return os.fsdecode(run.stdout)  # file names may be in any encoding

    wanted = ("ls-files", "-z", "--cached", "--others", "--exclude-standard")
    try:
        top = git("rev-parse", "--show-toplevel").strip()
    except FileNotFoundError as error:
        raise UploadError("git is not installed, and it knows which files to leave out: install it") from error
    except subprocess.CalledProcessError:
        top = ""
    if top and Path(top).resolve() == root.resolve():
        return git(*wanted).split("\0")[:-1]
    with tempfile.TemporaryDirectory() as empty:
        git("init", "--quiet", "--bare", empty)
        return git(f"--git-dir={empty}", f"--work-tree={root}", *wanted).split("\0")[:-1]


def is_ours(root: Path, name: str) -> bool:
    """Not in a cache, an output folder or a virtual environment, whatever git thinks of it."""
    folders = Path(name).parents
    in_environment = any((root / folder / "pyvenv.cfg").is_file() for folder in folders)
    return not in_environment and not any(fnmatch.fnmatch(part, no) for part in Path(name).parts for no in NOT_OURS)


def weights_in(folder: Path, root: Path) -> list[str]:
    """The finished files in `checkpoints/`, linked folders included; converted torch files are not needed beside those.

    Of linked folders only weights and tokenizers are taken. Raises OSError for a folder that cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    paths: list[Path] = []
    seen: set[Path] = set()
    for place, folders, names in os.walk(folder, onerror=fail if folder.exists() else None, followlinks=True):
        here = Path(os.path.realpath(place))
        if here in seen:  # a link to a folder that it is in
            folders.clear()
            continue
        seen.add(here)
        found = [Path(place, name) for name in names]
        if not here.is_relative_to(root.resolve() / "checkpoints"):
            tokens = TOKENIZER_SUFFIXES if "tokenizer_config.json" in names else ()
            found = [path for path in found if path.suffix in (*SUFFIXES, *tokens)]
        paths += found
    names = (path.relative_to(root).as_posix() for path in paths if os.path.lexists(path) and faster_form(path) == path)
    return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))


def is_secret(name: str) -> bool:
    return any(fnmatch.fnmatch(Path(name).name.lower(), pattern) for pattern in SECRET_NAMES)


def holds_token(file: Upload) -> bool:
    """Whether the text of a file has a Hub token in it: any that looks like one, and surely this user's own."""
    if file.size > SEARCHED_BYTES:
        return False
    content, own = file.path.read_bytes() if file.content is None else file.content, get_token()
    return TOKEN_TEXT.search(content) is not None or bool(own and own.encode() in content)


def without_checkpoints(gitignore: Upload) -> Upload:
    """The Hub would refuse the weights if its `.gitignore` kept them out, as ours does."""
    lines = gitignore.path.read_bytes().splitlines(keepends=True)
    return Upload(gitignore.path, gitignore.name, b"".join(line for line in lines if b"/checkpoints/" not in line))


def show(files: list[Upload], left_out: dict[str, str], args: argparse.Namespace) -> None:
    """Says what goes: each file in a dry run, the sum otherwise."""
    if args.dry_run:
        for file in files:
            print(f"{size_text(file.size):>9}  {file.name}")
    for name, reason in left_out.items():
        readable = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        print(f"left out, {reason}: {readable}")
    total = sum(file.size for file in files)
    weights = sum(file.size for file in files if file.name.startswith("checkpoints/"))
    print(f"{len(files)} files, {size_text(total)} ({size_text(weights)} in checkpoints/) for {args.repo}")
    if not args.released_weights:
        print("the released weights stay here: the app finds them on the Hub; --released-weights uploads them too")
    elif args.space and total > SPACE_BYTES:
        print(f"a Space holds {size_text(SPACE_BYTES)} for free: rather use --no-released-weights")


# Sending


def owned_repo(api: HfApi, repo: str) -> str:
    """USER/NAME, after asking the Hub who the token belongs to and whether it may write there."""
    tokens = f"{api.endpoint}/settings/tokens"
    try:
        who = api.whoami()
    except LocalTokenNotFoundError as error:
        raise UploadError(f"no token: run `hf auth login` or set HF_TOKEN, with one of {tokens}") from error
    except NETWORK_ERRORS as error:
        raise UploadError(refusal(error, f"{api.endpoint}/{repo}")) from error
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UploadError(f"the token can only read: make one that writes at {tokens}")
    owner, _, name = repo.rpartition("/")
    owners = [who["name"], *(org["name"] for org in who.get("orgs", []))]
    if owner and owner not in owners:
        raise UploadError(f"the token belongs to {who['name']}, who may not write for {owner}: use {', '.join(owners)}")
    return f"{owner or who['name']}/{name}"


def make_repo(api: HfApi, repo: str, kind: str, args: argparse.Namespace) -> None:
    """Creates the repository if it is not there; hardware is asked for in both cases."""
    new = not api.repo_exists(repo, repo_type=kind)
    settings = {"space_sdk": "gradio", "space_hardware": args.hardware} if kind == "space" else {}
    api.create_repo(repo, repo_type=kind, private=args.private or None, exist_ok=True, **settings)
    if args.hardware and not new:
        api.request_space_hardware(repo, args.hardware)


def on_hub(api: HfApi, repo: str, kind: str) -> dict[str, tuple[int, str]]:
    """Size and digest of every file that the repository has."""
    entries = api.list_repo_tree(repo, repo_type=kind, recursive=True)
    files = (entry for entry in entries if isinstance(entry, RepoFile))
    return {entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id) for entry in files}


def is_there(file: Upload, there: dict[str, tuple[int, str]]) -> bool:
    if file.name not in there:
        return False
    size, digest = there[file.name]
    if file.content is None:
        return is_same(file.path, size, digest)
    found = hash_like(digest, file.size)
    found.update(file.content)
    return found.hexdigest() == digest


def send(api: HfApi, repo: str, kind: str, files: list[Upload], page: str) -> None:
    """One commit per batch: what is committed stays, whatever happens later."""
    starters = [file for file in files if file.name in STARTERS]
    parts = [*batches(file for file in files if file not in starters), *batches(starters)]
    for number, part in enumerate(parts, 1):
        size = sum(file.size for file in part)
        print(f"commit {number} of {len(parts)}: {len(part)} files, {size_text(size)}")
        message = "Upload Infinite-World" + (f" (part {number} of {len(parts)})" if len(parts) > 1 else "")
        additions = [
            CommitOperationAdd(file.name, str(file.path) if file.content is None else file.content) for file in part
        ]
        patience = RetryPolicy(lambda error: refusal(error, page))
        while True:
            try:
                api.create_commit(repo, additions, commit_message=message, repo_type=kind)
                break
            except NETWORK_ERRORS as error:
                patience.wait(error)
            except (RuntimeError, ConnectionError, TimeoutError) as error:  # the client's, of a large file
                patience.wait(error.__cause__ if isinstance(error.__cause__, NETWORK_ERRORS) else error)


def batches(files: Iterable[Upload]) -> Iterator[list[Upload]]:
    """Files in groups of at most COMMIT_FILES and, unless one file is larger, COMMIT_BYTES."""
    batch: list[Upload] = []
    for file in files:
        full = len(batch) >= COMMIT_FILES or sum(other.size for other in batch) + file.size > COMMIT_BYTES
        if batch and full:
            yield batch
            batch = []
        batch.append(file)
    if batch:
        yield batch


def refusal(error: Exception, page: str) -> str:
    """What the Hub did not let pass, and the way out."""
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    known: dict[int | None, str] = {
        401: f"the token is not valid: make one that writes at {tokens}",
        402: f"{page} has to be paid for: add a way to pay, or choose another --hardware",
        403: f"the token may not write to {page}: make one that writes at {tokens}",
        409: f"{page} was changed by somebody else at the same time: run the same again",
    }
    return known.get(status_of(error)) or f"{explain(error, page.removeprefix(constants.ENDPOINT + '/'))}"


if __name__ == "__main__":
    sys.exit(main())
