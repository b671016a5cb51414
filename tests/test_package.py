"""The installed package: what is in it, that it works from any folder, and that its requirements are in one place."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import infworld
from infworld import cli
from infworld.config import PROJECT_ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(lines) -> set[str]:
    return {str(Requirement(line)) for line in lines if line and not line.startswith("#")}


def test_a_space_installs_the_dependencies_and_the_extra_app(project):
    listed = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert requirements(listed) == requirements(project["dependencies"] + project["optional-dependencies"]["app"])


def test_the_lock_has_every_requirement_at_a_version_that_fits(project):
    lines = (PROJECT_ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = [Requirement(line.rstrip("\\ ")) for line in lines if line and not line.startswith((" ", "#", "-"))]
    extras = project["optional-dependencies"]
    locked_extras = {"dev"}.union(*(Requirement(line).extras for line in extras["dev"]))
    wanted = [*project["dependencies"], *sum((extras[name] for name in locked_extras), [])]
    for found in map(Requirement, wanted):
        if found.name != project["name"]:
            pins = [pin for pin in locked if pin.name.lower().replace("_", "-") == found.name.lower().replace("_", "-")]
            assert pins, f"{found.name} is not locked"
            assert all(found.specifier.contains(str(pin.specifier).lstrip("=")) for pin in pins)


# Built and installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Python of a virtual environment with the wheel; what else it needs comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, PROJECT_ROOT]
    built = subprocess.run(build, capture_output=True, text=True)
    if built.returncode:
        pytest.skip(f"pip cannot build a wheel here: {built.stderr[-300:]}")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    ours = subprocess.run([python, "-c", "import site; print(site.getsitepackages()[-1])"], capture_output=True)
    theirs = [path for path in sys.path if Path(path).name == "site-packages"]
    (Path(ours.stdout.decode().strip()) / "theirs.pth").write_text("\n".join(theirs))
    return python


def run(python: Path, folder: Path, *arguments: str) -> str:
    """What `infworld` says with these arguments, in another folder than the project's and for a new user."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HOME")}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [python.with_name("infworld"), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_makes_a_film_in_any_folder(installed, tmp_path, picture):
    options = ["--frames", "81", "--steps", "1", "--device", "cpu", "--out", "film.mp4"]
    run(installed, tmp_path, "generate", "--image", str(picture), "--actions", "forward 80", *options)
    assert (tmp_path / "film.mp4").stat().st_size > 10_000


def test_everything_that_comes_along_is_found_and_downloads_go_to_the_user(installed, tmp_path):
    code = (
        "import infworld, infworld.config as config; from infworld import hub; from infworld.app.page import EXAMPLES;"
        "print(infworld.__file__, hub.find(config.load_config('tiny')).checkpoint_path, EXAMPLES, hub.weights_folder())"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf")}
    found = subprocess.run([installed, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    module, weights, examples, downloads = map(Path, found.stdout.split())
    assert installed.parent.parent in module.parents
    assert weights == module.parent / "checkpoints/tiny/world.safetensors"
    assert examples == module.parent / "examples"
    assert {path.name for path in examples.iterdir()} == {path.name for path in (PROJECT_ROOT / "examples").iterdir()}
    assert tmp_path in downloads.parents and not downloads.exists()


def test_the_version_is_that_of_the_code(installed, tmp_path):
    assert run(installed, tmp_path, "--version").split() == ["infworld", infworld.__version__]
    found = subprocess.run(
        [installed, "-c", "from importlib import metadata; print(metadata.version('infworld'))"], capture_output=True
    )
    assert found.stdout.decode().strip() == infworld.__version__


# The command


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_under_its_own_name(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["infworld"])
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: infworld {command} ")


def test_the_usage_names_every_command(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        assert cli.main(arguments) == 0
        assert all(f"  {command} " in capsys.readouterr().out for command in list(cli.COMMANDS)[:1])


def test_an_unknown_command_is_an_error_with_the_known_ones(capsys):
    assert cli.main(["dream"]) == 2
    assert "unknown command 'dream'" in (said := capsys.readouterr().err) and "generate" in said
    assert cli.main(["train", "everything"]) == 2
    assert "choose one of: train vae, train world" in capsys.readouterr().err


def test_what_a_command_needs_is_named_with_the_extra_that_has_it():
    code = "import sys; sys.modules['gradio'] = None; from infworld import cli; sys.exit(cli.main(['serve']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "infworld serve needs gradio: pip install 'infworld[app]'" in done.stderr
