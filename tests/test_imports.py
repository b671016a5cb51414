"""Imports between the package's modules point one way only."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "infworld"
# From the leaves upwards. Modules of one layer may import each other, as long as there is no circle.
LAYERS = (
    {"config", "actions", "camera", "files", "video", "pictures", "picture_files", "measures", "devices"},
    {
        "fused",
        "triton_kernels",
        "layers",
        "offload",
        "memory",
        "dit",
        "vae",
        "text",
        "quantized",
        "sampler",
        "presets",
        "checkpoint",
        "lora",
    },
    {"settings", "session", "progress"},
    {"metrics"},
    {"kernels", "memory_plan", "transfer", "hub", "models", "arena"},
    {"world", "live", "loading"},
    {"parallel", "evaluation"},
    {"training", "videos", "cli", "app"},
)
MODELS = {"layers", "offload", "memory", "dit", "vae", "text", "sampler", "presets"}


def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports where it runs, without those for a type checker only."""
    found = set()

    class Visitor(ast.NodeVisitor):
        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) != "TYPE_CHECKING":
                self.generic_visit(node)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            if node.module == "infworld":
                found.update(alias.name for alias in node.names)
            elif node.module and node.module.startswith("infworld."):
                found.add(node.module.split(".")[1])

        def visit_Import(self, node: ast.Import) -> None:
            found.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("infworld."))

    Visitor().visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


@cache
def modules() -> dict[str, set[str]]:
    """What each module or subpackage of the package imports, by name."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name not in ("__init__", "__main__"):
            found.setdefault(name, set()).update(imports(path) - {name})
    return found


def layer(name: str) -> int:
    return next(number for number, names in enumerate(LAYERS) if name in names)


def test_every_module_has_its_layer():
    assert modules().keys() <= set().union(*LAYERS)


@pytest.mark.parametrize("name", sorted(modules().keys() & set().union(*LAYERS)))
def test_no_import_points_upwards(name):
    known = modules()
    assert [other for other in known[name] if other in known and layer(other) > layer(name)] == []


def test_no_circle():
    left = dict(modules())
    while left:
        free = {name for name, used in left.items() if not used & left.keys()}
        assert free or left.keys() <= {"training", "videos", "cli", "app"}, (
            f"{sorted(left)} import each other in a circle"
        )
        left = {name: used for name, used in left.items() if name in left.keys() - free} if free else {}


def test_the_models_know_nothing_of_teams():
    known = modules()
    for name in MODELS:
        assert "parallel" not in known[name]
        text = (PACKAGE / f"{name}.py").read_text(encoding="utf-8")
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert not names & {"Team", "RankGroup", "SpatialShard", "TokenShard"}
