"""The project on its way to the Hub: huggingface_hub's real client against a server on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import LFS_SIZE, TOKEN, HubServer, connect
from huggingface_hub.utils import _http

from infworld import transfer
from infworld.cli import upload as upload_to_hf
from infworld.cli.console import INTERRUPTED
from infworld.config import PROJECT_ROOT

REPO = "somebody/world"
CODE = {
    "README.md": b"---\ntitle: World\nsdk: gradio\n---\n",
    "app.py": b"print('hello')\n",
    "requirements.txt": b"torch\n",
    "infworld/__init__.py": b"",
    "docs/film.webp": bytes(range(256)) * 20,
    "checkpoints/tiny/world.safetensors": b"tiny" * LFS_SIZE,
}
WEIGHTS = {"checkpoints/world.ckpt": b"large" * LFS_SIZE, "checkpoints/models/t5.pth": b"text" * LFS_SIZE}
NEVER = {
    "outputs/film.mp4": b"film",
    "infworld/__pycache__/config.cpython-311.pyc": b"code",
    ".venv/lib/torch.py": b"torch",
    "env/pyvenv.cfg": b"home = /usr/bin",
    "env/lib/torch.py": b"torch",
    ".gradio/cache": b"cache",
    "checkpoints/.hub.json": b"{}",
    "checkpoints/models/.t5.pth.0123456789ab.part": b"half",
    "ignored.log": b"log",
}
SECRETS = {".env": b"HF_TOKEN=x", "token": b"x", "docs/hf_token.txt": b"x", "configs/credentials.json": b"{}"}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A small project with everything beside it that must not go up."""
    root = tmp_path / "project"
    rules = (PROJECT_ROOT / ".gitignore").read_bytes() + b"*.log\n"
    write(root, {**CODE, **WEIGHTS, **NEVER, **SECRETS, ".gitignore": rules})
    subprocess.run(["git", "init", "--quiet", root], check=True)
    monkeypatch.setattr(upload_to_hf, "PROJECT_ROOT", root)
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    return root


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The Hub, and a token that may write there; no time is waited, neither here nor by huggingface_hub's client."""
    monkeypatch.setattr(transfer, "sleep", lambda seconds: None)
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
    with HubServer() as server:
        connect(server, monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def run(*arguments: str) -> int:
    return upload_to_hf.main(list(arguments))


def uploaded(server: HubServer) -> dict[str, bytes]:
    """What the repository has now, without what the Hub itself puts there."""
    return {name: content for name, content in server.repos[REPO].files.items() if name != ".gitattributes"}


def transferred(server: HubServer) -> int:
    """Large files that came in so far."""
    return sum(request.method == "PUT" for request in server.requests)


# What goes


def test_a_model_repository_gets_the_project_and_its_weights_and_nothing_else(server, project, capsys):
    assert run(REPO) == 0
    files = uploaded(server)
    assert b"/checkpoints/" not in files.pop(".gitignore"), "or the Hub would refuse the weights"
    assert files == {**CODE, **WEIGHTS}
    assert server.repos[REPO].kind == "model"
    assert f"complete: {server.url}/{REPO}" in capsys.readouterr().out


def test_a_space_leaves_the_released_weights_to_the_hub_unless_asked(server, project, capsys):
    assert run(REPO, "--space", "--hardware", "zero-a10g", "--private") == 0
    files = uploaded(server)
    assert files.pop(".gitignore") == (project / ".gitignore").read_bytes()
    assert files == CODE
    wish = server.repos[REPO].settings
    assert (wish["type"], wish["sdk"], wish["hardware"]) == ("space", "gradio", "zero-a10g")
    assert wish["visibility"] == "private"
    assert "released weights stay here" in capsys.readouterr().out
    assert run(REPO, "--space", "--released-weights") == 0
    assert uploaded(server).keys() - files.keys() == WEIGHTS.keys() | {".gitignore"}


def test_a_space_starts_only_with_the_last_commit(server, project, monkeypatch):
    monkeypatch.setattr(upload_to_hf, "COMMIT_FILES", 3)
    assert run(REPO, "--space") == 0
    *earlier, last = list(server.repos[REPO].commits.values())
    assert all("app.py" not in files and "README.md" not in files for files in earlier)
    assert set(upload_to_hf.STARTERS) <= last.keys()
    assert ".gitignore" in earlier[1], "the rules go before what they are about"


def test_hardware_of_a_space_that_is_there_is_changed(server, project):
    assert run(REPO, "--space") == 0
    assert run(REPO, "--space", "--hardware", "l4x1") == 0
    assert server.repos[REPO].settings["hardware"] == "l4x1"


def test_a_converted_weight_file_goes_in_place_of_its_original(server, project):
    write(project, {"checkpoints/world.safetensors": b"fast" * LFS_SIZE})
    assert run(REPO) == 0
    names = uploaded(server).keys()
    assert "checkpoints/world.safetensors" in names
    assert "checkpoints/world.ckpt" not in names


def test_a_copy_without_git_history_uploads_the_same(server, project):
    subprocess.run(["rm", "-r", project / ".git"], check=True)
    assert run(REPO) == 0
    assert uploaded(server).keys() == {*CODE, *WEIGHTS, ".gitignore"}


def test_the_name_comes_from_the_environment_and_the_owner_from_the_token(server, project, monkeypatch):
    monkeypatch.setenv("HF_REPO_ID", "world")
    assert run() == 0
    assert REPO in server.repos


def test_without_a_name_nothing_happens(server, project, capsys):
    with pytest.raises(SystemExit):
        run()
    assert "USER/NAME, or set HF_REPO_ID" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(REPO, "--hardware", "l4x1")
    assert not server.requests


# Secrets


def test_secrets_stay_here_and_are_named(server, project, capsys):
    assert run(REPO) == 0
    assert not SECRETS.keys() & uploaded(server).keys()
    said = capsys.readouterr().out
    assert all(f"left out, as it may be a secret: {name}" in said for name in SECRETS)


@pytest.mark.parametrize("text", ["hf_" + "a1B2" * 9, TOKEN])
def test_a_token_inside_a_file_stops_everything(text, server, project, capsys):
    write(project, {"notes/setup.md": f"login with {text}, it works".encode()})
    assert run(REPO) == 2
    said = capsys.readouterr()
    assert "notes/setup.md holds what looks like a Hub token" in said.err
    assert text not in said.out + said.err
    assert not server.requests


def test_the_token_is_used_and_never_shown_nor_stored(server, project, capfd):
    assert run(REPO) == 0
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert not any(TOKEN.encode() in content for content in uploaded(server).values())
    assert {request.token for request in server.asked("/commit/main", "POST")} == {f"Bearer {TOKEN}"}


# Links and names


KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder outside of the project, with weights, a tokenizer and things that are nobody else's."""
    tokenizer = {
        "models/google/umt5-xxl/tokenizer_config.json": b"{}",
        "models/google/umt5-xxl/spiece.model": b"pieces",
    }
    private = {"models/notes.md": b"private", "models/config.json": b"private", "models/.ssh/key.pth": KEY, "id": KEY}
    write(tmp_path / "disk", {"models/t5.pth": WEIGHTS["checkpoints/models/t5.pth"], **tokenizer, **private})
    return tmp_path / "disk"


def contents(server: HubServer) -> bytes:
    return b"".join(uploaded(server).values())


def test_a_linked_folder_of_weights_goes_up(server, project, elsewhere):
    shutil.rmtree(project / "checkpoints/models")
    (project / "checkpoints/models").symlink_to(elsewhere / "models")
    (elsewhere / "models/again").symlink_to(elsewhere / "models")  # round in a circle
    assert run(REPO) == 0
    files = uploaded(server)
    tokenizer = {f"checkpoints/models/google/umt5-xxl/{name}" for name in ("tokenizer_config.json", "spiece.model")}
    assert files.keys() == {*CODE, *WEIGHTS, *tokenizer, ".gitignore"}
    assert files["checkpoints/models/t5.pth"] == WEIGHTS["checkpoints/models/t5.pth"]
    assert b"private" not in contents(server) and KEY not in contents(server)


def test_linked_checkpoints_go_up(server, project, elsewhere):
    shutil.move(project / "checkpoints", elsewhere / "all")
    (project / "checkpoints").symlink_to(elsewhere / "all")
    assert run(REPO) == 0
    assert uploaded(server).keys() >= {"checkpoints/tiny/world.safetensors", *WEIGHTS}


def test_linked_checkpoints_that_stay_here_are_named(server, project, elsewhere, capsys):
    shutil.move(project / "checkpoints", elsewhere / "all")
    (project / "checkpoints").symlink_to(elsewhere / "all")
    assert run(REPO, "--space") == 0
    assert "left out, as it is a link to a folder or to nothing: checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["docs/notes.txt", "checkpoints/world2.ckpt", "checkpoints/models/umt5.safetensors", "x"]
)
@pytest.mark.parametrize("tracked", [False, True])
def test_a_file_outside_is_never_uploaded_through_a_link(server, project, elsewhere, capsys, name, tracked):
    (project / name).symlink_to(elsewhere / "id")
    if tracked:
        subprocess.run(["git", "-C", project, "add", "--force", name], check=True)
    assert run(REPO) == 0
    assert name not in uploaded(server) and KEY not in contents(server)
    assert f"left out, as it is a link to a file outside of the project: copy it here if it shall go: {name}" in (
        capsys.readouterr().out
    )


def test_links_inside_of_a_linked_folder_lead_to_nothing_else(server, project, elsewhere, capsys):
    (elsewhere / "models/world.pth").symlink_to(elsewhere / "id")
    (project / "checkpoints/linked").symlink_to(elsewhere / "models")
    assert run(REPO) == 0
    assert KEY not in contents(server)
    assert (
        "outside of the project: copy it here if it shall go: checkpoints/linked/world.pth" in capsys.readouterr().out
    )


def test_links_inside_of_the_project(server, project, capsys):
    for name, target in {
        "docs/start.md": "../README.md",
        "docs/env": "../.env",
        "docs/film": "../outputs/film.mp4",
    }.items():
        (project / name).symlink_to(target)
    (project / "gone").symlink_to("nowhere")
    (project / "pages").symlink_to("docs")
    (project / "checkpoints/all").symlink_to("..")
    assert run(REPO) == 0
    assert uploaded(server)["docs/start.md"] == CODE["README.md"]
    assert uploaded(server).keys() == {*CODE, *WEIGHTS, ".gitignore", "docs/start.md"}
    said = capsys.readouterr().out
    assert "left out, as it may be a secret: docs/env" in said
    assert "left out, as it is a link to a file that stays here: docs/film" in said
    assert "a link to a folder or to nothing: gone" in said and "a link to a folder or to nothing: pages" in said


@pytest.mark.parametrize("folder", ["docs", "checkpoints/models"])
def test_a_name_that_is_not_utf8_is_left_out_and_named(server, project, capsys, folder):
    latin = os.fsencode(project / folder) + b"/caf\xe9.pth"
    Path(os.fsdecode(latin)).write_bytes(b"x")
    write(project, {"docs/über.txt": b"x"})
    assert run(REPO) == 0
    assert f"left out, as its name is not UTF-8: {folder}/caf\\xe9.pth" in capsys.readouterr().out
    assert uploaded(server).keys() == {*CODE, *WEIGHTS, ".gitignore", "docs/über.txt"}


# Dry run


def test_a_dry_run_lists_and_touches_nothing(server, project, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert run(REPO, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    listed = {line[11:]: line[:9].strip() for line in said if line[:9].strip()[:1].isdigit() and line[9:11] == "  "}
    assert listed.keys() == {*CODE, *WEIGHTS, ".gitignore"}
    assert listed["checkpoints/world.ckpt"] == "10 kB"
    assert said[-1].startswith("9 files, ")
    assert not server.requests


# Taking up again


def test_many_files_go_in_several_commits(server, project, monkeypatch, capsys):
    monkeypatch.setattr(upload_to_hf, "COMMIT_FILES", 4)
    assert run(REPO) == 0
    assert [f"Upload Infinite-World (part {n} of 3)" for n in (1, 2, 3)] == server.repos[REPO].messages[1:]
    assert "commit 3 of 3: 3 files" in capsys.readouterr().out


def test_a_large_file_has_a_commit_of_its_own(server, project, monkeypatch):
    monkeypatch.setattr(upload_to_hf, "COMMIT_BYTES", len(WEIGHTS["checkpoints/world.ckpt"]) - 1)
    assert run(REPO) == 0
    versions = [set(files) for files in server.repos[REPO].commits.values()]
    new = [after - before for before, after in zip(versions, versions[1:], strict=False)]
    assert {"checkpoints/world.ckpt"} in new


def test_a_second_run_sends_only_what_changed(server, project, capsys):
    assert run(REPO) == 0
    large = transferred(server)
    assert run(REPO) == 0
    assert "has 9 of 9 files" in capsys.readouterr().out
    assert len(server.asked("/commit/main", "POST")) == 2
    write(project, {"app.py": b"print('changed')\n"})
    assert run(REPO) == 0
    assert uploaded(server)["app.py"] == b"print('changed')\n"
    assert transferred(server) == large


def test_an_upload_that_broke_off_goes_on(server, project, monkeypatch, capsys):
    monkeypatch.setattr(upload_to_hf, "COMMIT_FILES", 4)
    server.status["/commit/main"] = []
    real, made = upload_to_hf.HfApi.create_commit, []

    def breaks(self, *arguments, **options):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(upload_to_hf.HfApi, "create_commit", breaks)
        assert run(REPO) == INTERRUPTED
    assert "run the same again to go on" in capsys.readouterr().err
    before = transferred(server)
    assert run(REPO) == 0
    assert "has 4 of 9 files" in capsys.readouterr().out
    assert uploaded(server).keys() == {*CODE, *WEIGHTS, ".gitignore"}
    assert 0 < before < transferred(server) == 4, "no large file goes twice"


@pytest.mark.parametrize("where", ["/commit/main", "/preupload/", "/lfs/"])
def test_trouble_that_passes_is_waited_for(where, server, project):
    server.status[where] = [(503, {}), (429, {"Retry-After": "2"})]
    assert run(REPO) == 0
    assert uploaded(server).keys() == {*CODE, *WEIGHTS, ".gitignore"}


def test_what_the_hub_ignores_is_not_taken_for_uploaded(server, project, capsys):
    """Its `.gitignore` may know rules that git here does not."""
    (project / ".git/info/exclude").write_text("")
    subprocess.run(["git", "-C", project, "add", "--force", "ignored.log"], check=True)
    assert run(REPO) == 2
    assert "the Hub did not take 1 files: ignored.log" in capsys.readouterr().err


# Refusals


def test_no_token_is_said(server, project, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    assert run(REPO) == 2
    assert "no token: run `hf auth login` or set HF_TOKEN" in capsys.readouterr().err


def test_a_token_that_is_not_valid_is_said(server, project, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "x")
    assert run(REPO) == 2
    said = capsys.readouterr().err
    assert "the token is not valid: make one that writes at" in said
    assert TOKEN[:10] not in said


def test_a_token_that_can_only_read_is_said_before_anything_is_made(server, project, capsys):
    server.who["auth"]["accessToken"]["role"] = "read"
    assert run(REPO) == 2
    assert "the token can only read" in capsys.readouterr().err
    assert not server.repos


def test_another_ones_name_is_refused(server, project, capsys):
    server.who["orgs"] = [{"name": "us"}]
    assert run("stranger/world") == 2
    assert "belongs to somebody, who may not write for stranger: use somebody, us" in capsys.readouterr().err
    assert run("us/world") == 0
    assert "us/world" in server.repos


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        ("/api/repos/create", 402, "has to be paid for"),
        ("/api/repos/create", 403, "may not write to"),
        ("/commit/main", 403, "may not write to"),
        ("/preupload/", 401, "the token is not valid"),
        ("/commit/main", 412, r"trouble (status 412)"),
    ],
)
def test_a_refusal_says_what_to_do(where, status, message, server, project, capsys):
    server.status[where] = [(status, {})] * 20
    assert run(REPO) == 2
    said = capsys.readouterr().err
    assert message in said
    assert TOKEN not in said


def test_no_network_is_said(server, project, capsys):
    server.shutdown()
    server.server_close()
    assert run(REPO) == 2
    assert "cannot reach" in capsys.readouterr().err
