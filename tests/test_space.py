"""The front matter of README.md and requirements.txt, against what Spaces and ZeroGPU accept (August 2026)."""

from __future__ import annotations

import ast
import re
import sys
import unicodedata
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement
from packaging.version import Version

from infworld import hub
from infworld.config import PROJECT_ROOT

KEYS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "app_port"),
    *("base_path", "fullWidth", "header", "short_description", "models", "datasets", "tags", "thumbnail", "pinned"),
    *("license", "startup_duration_timeout", "preload_from_hub", "suggested_hardware", "suggested_storage"),
    *("custom_headers", "hf_oauth", "hf_oauth_scopes", "disable_embedding"),
}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
ZERO_TORCH = ("2.8.0", "2.9.1", "2.10.0", "2.11.0")
ZERO_PYTHON = ("3.10", "3.10.13", "3.12", "3.12.12")
# Installed by the Space itself at the version that fits the machine, or of no use on one without a compiler for CUDA.
FORBIDDEN = {"flash-attn", "xformers", "apex", "bitsandbytes", "triton", "torch-xla", "pip", "setuptools"}
LICENSES = {"mit", "apache-2.0", "bsd-3-clause"}


@pytest.fixture(scope="module")
def card() -> dict:
    text = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\n"), "the front matter must be the first thing in the file"
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(scope="module")
def requirements() -> dict[str, Requirement]:
    lines = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return {found.name.lower().replace("_", "-"): found for found in map(Requirement, filter(None, lines))}


def test_the_card_has_known_keys_and_the_needed_ones(card):
    assert card.keys() <= KEYS
    assert {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "app_file", "license"} <= card.keys()
    assert card["sdk"] == "gradio"
    assert {card["colorFrom"], card["colorTo"]} <= COLORS
    assert card["license"] in LICENSES
    assert isinstance(card["pinned"], bool)
    assert 0 < len(card["short_description"]) <= 60
    assert (PROJECT_ROOT / card["app_file"]).is_file()


def test_the_emoji_is_one(card):
    joiners = "\ufe0f\u200d"  # variation selector, zero-width joiner
    assert len([sign for sign in card["emoji"] if sign not in joiners]) == 1
    assert unicodedata.category(card["emoji"][0]) == "So"


def test_lists_are_lists_of_names(card):
    assert all(isinstance(tag, str) and tag for tag in card.get("tags", []))
    assert hub.REPO in card["models"]
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in card["models"])


def test_what_is_preloaded_is_what_is_used(card):
    """`preload_from_hub`: "REPO", "REPO file,file" or "REPO file,file COMMIT"; a wrong one fails the build."""
    for line in card.get("preload_from_hub", []):
        repo, *rest = line.split()
        assert repo in (hub.REPO, hub.FALLBACK_REPO)
        assert len(rest) < 2 or re.fullmatch(r"[0-9a-f]{40}", rest[1])


def test_the_hardware_is_one_that_spaces_have(card):
    assert card["suggested_hardware"] in {flavor.value for flavor in SpaceHardware}


def test_the_timeout_is_a_duration(card):
    assert re.fullmatch(r"\d+(s|m|h|d)?( minutes?| hours?)?", str(card.get("startup_duration_timeout", "30m")))


def test_python_and_gradio_are_named_exactly_and_fit(card, requirements):
    python = card["python_version"]
    assert isinstance(python, str), "3.10 without quotes is the number 3.1"
    assert python in ZERO_PYTHON
    assert isinstance(card["sdk_version"], str)
    assert re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    assert requirements["gradio"].specifier.contains(card["sdk_version"]), "or the installation fights with itself"


def test_the_page_is_tested_with_the_gradio_that_the_space_runs(card):
    import gradio

    installed, space = Version(gradio.__version__), Version(card["sdk_version"])
    assert (installed.major, installed.minor) == (space.major, space.minor)


def test_torch_has_a_version_that_zerogpu_has(requirements):
    assert [version for version in ZERO_TORCH if requirements["torch"].specifier.contains(version)]


def test_nothing_in_the_requirements_fails_on_a_space(requirements):
    assert not requirements.keys() & FORBIDDEN
    assert not [found for found in requirements.values() if found.url], "a Space builds nothing from a repository"
    assert "spaces" in requirements


def test_every_line_of_the_requirements_is_plain():
    """No options, links or local paths: a Space reads the file before it has the project."""
    for line in (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert not line.startswith(("-", ".", "/", "git+", "http")), line


def test_every_import_outside_of_tests_is_required(requirements):
    """What a Space installs is enough for what it runs."""
    packages = {
        "PIL": "pillow",
        "yaml": "pyyaml",
        "imageio_ffmpeg": "imageio",
        "tokenizers": "transformers",
        "triton": "torch",
        "pydantic": "gradio",
        "starlette": "gradio",
        "httpx": "gradio",
    }
    optional = {"infworld", "app", "ray", "playwright", "fa3_fwd_interface", "flash_attn"}
    package = PROJECT_ROOT / "infworld"
    extras = {
        package / name for name in ("training", "metrics", "evaluation", "arena", "videos")
    }  # a Space does without
    files = [path for path in package.rglob("*.py") if not extras & set(path.parents)]
    for path in files:
        for name in imported(path) - set(sys.stdlib_module_names) - optional:
            assert packages.get(name, name.replace("_", "-")) in requirements, f"{path.name} imports {name}"


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports anywhere in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}
