"""Blocks compiled ahead of time compute what others do; a package that does not fit, or does not work, is no harm."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
import spaces
import torch
from conftest import make_small_model
from torch._inductor import config as inductor

import infworld
from infworld import packages
from infworld.cli import compile_blocks
from infworld.cli import upload as upload_to_hf
from infworld.config import PROJECT_ROOT, load_config
from infworld.dit import InfiniteWorldTransformer

MEMORIES = (1, 5)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Config of a small model with a package beside its weights, made by the command; not optimised, to be quick."""
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("no C++ compiler on PATH")
    path = make_small_model(tmp_path_factory.mktemp("packaged"))
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
    with inductor.patch(quick), pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFWORLD_CHECKPOINTS", str(path.parent))
        assert compile_blocks.main(["--model", str(path), "--device", "cpu"]) == 0
    return path


@pytest.fixture
def copied(small, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(small.parent, tmp_path / "copy") / small.name


def packaged(transformer: InfiniteWorldTransformer) -> bool:
    return all(step in vars(block) for block in transformer.blocks for step in packages.STEPS)


@torch.inference_mode()
def velocity(model: InfiniteWorldTransformer, latents: int, grid: tuple[int, int] = (4, 6), batch: int = 1):
    """Of one step after so many latents of memory."""
    generator = torch.Generator().manual_seed(latents)
    draw = lambda *shape: torch.randn(batch, *shape, generator=generator)  # noqa: E731
    context = model.embed_text(draw(16, model.config.caption_channels), torch.ones(batch, 16))
    stream = model.encode_memory(draw(16, latents, *grid), context)
    return model.denoise(draw(16, 3, *grid), torch.full((batch,), 700.0), stream, draw(3, model.config.dim), context)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max() / b.abs().max())


def test_a_package_in_the_weights_folder_is_found_too(small, tmp_path, monkeypatch):
    shutil.copytree(small.parent, tmp_path / "copy", ignore=shutil.ignore_patterns("blocks-*"))
    assert not packaged(infworld.load(tmp_path / "copy" / small.name, device="cpu").transformer)
    monkeypatch.setenv("INFWORLD_CHECKPOINTS", str(small.parent))
    assert packaged(infworld.load(tmp_path / "copy" / small.name, device="cpu").transformer)


def change_record(path: Path, **changes) -> None:
    (record,) = path.parent.glob(f"*/{packages.RECORD}")
    record.write_text(json.dumps({**json.loads(record.read_text()), **changes}))


def counted(transformer: InfiniteWorldTransformer, monkeypatch) -> list:
    """Grows with every call of a package."""
    calls, call = [], packages._Code.__call__
    monkeypatch.setattr(packages._Code, "__call__", lambda code, *inputs: calls.append(code) or call(code, *inputs))
    assert packaged(transformer)
    return calls


def warnings(caplog) -> list[str]:
    """What the library has said, up to the comma."""
    ours = [record for record in caplog.records if record.name == packages.__name__ and record.levelname == "WARNING"]
    return [record.getMessage().split(",")[0] for record in ours]


def test_blocks_of_a_package_compute_what_blocks_do(small, world, monkeypatch):
    """Every block with its own weights, for memories and pictures of other sizes than the package was made with."""
    model = infworld.load(small, "cpu").transformer
    calls = counted(model, monkeypatch)
    assert not packaged(world.transformer)
    weights = [block.ffn[0].weight for block in model.blocks]
    assert not torch.equal(*weights)
    for latents in MEMORIES:
        for grid in ((4, 6), (6, 4), (8, 6)):
            assert difference(velocity(model, latents, grid), velocity(world.transformer, latents, grid)) < 1e-5
    # Nothing reads the memory's tokens that leave the last block.
    assert len(calls) == 6 * (2 * len(weights) - 1)


def test_a_film_is_the_same(small, world, picture):
    film, plain = (
        next(w.rollout(picture, "forward 40, right 40", num_frames=81)) for w in (infworld.load(small, "cpu"), world)
    )
    assert difference(film.latents, plain.latents) < 1e-4


def test_weights_that_move_are_found(small, world):
    """As on ZeroGPU, where a parameter gets its place on the GPU after the model is loaded."""
    model = infworld.load(small, "cpu").transformer
    velocity(model, 1)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone() * 0.5
    plain = InfiniteWorldTransformer(model.config).eval()
    plain.load_state_dict(model.state_dict())
    assert difference(velocity(model, 1), velocity(plain, 1)) < 1e-5


def test_a_package_is_loaded_once_whatever_thread_asks(small, world, monkeypatch):
    """On the page every chunk is made in a thread of its own."""
    loaded, load = [], torch._inductor.aoti_load_package
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda path: loaded.append(path) or load(path))
    model, found = infworld.load(small, "cpu").transformer, []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(velocity(model, 1)))
        thread.start()
        thread.join()
    assert len(found) == 2
    assert all(difference(result, velocity(world.transformer, 1)) < 1e-5 for result in found)
    assert len(loaded) == len(packages.STEPS)


def test_what_a_package_was_not_made_for_goes_without(small, world, monkeypatch):
    model = infworld.load(small, "cpu").transformer
    calls = counted(model, monkeypatch)
    assert difference(velocity(model, 1, batch=2), velocity(world.transformer, 1, batch=2)) == 0
    block = model.blocks[0]
    tokens, rope = torch.randn(1, 4, 48, requires_grad=True), torch.randn(1, 4, 6, 2)
    block.memory_step(
        tokens, torch.zeros(1, 6, 48), rope, block.cross_attn.keys_values(torch.randn(1, 3, 48))
    ).sum().backward()
    assert tokens.grad.any()
    model.offload_blocks()
    assert difference(velocity(model, 1), velocity(world.transformer, 1)) == 0
    assert calls == []


@pytest.mark.parametrize(
    "changes",
    [
        {"torch": "2.7.0"},
        {"sizes": {"dim": 48, "ffn_dim": 128, "num_heads": 4}},
        {"dtype": "bfloat16"},
        {"device": "sm90"},
        {"code": ""},
        {"instructions": ["avx9000"]},
    ],
)
def test_an_unfitting_package_is_passed_over(copied, caplog, changes):
    change_record(copied, **changes)
    with caplog.at_level(logging.INFO):
        world = infworld.load(copied, "cpu")
    assert not packaged(world.transformer)
    (name,) = changes
    assert f"was made for other {name}" in caplog.text


def test_a_package_takes_the_place_of_torch_compile(small, copied, monkeypatch):
    compiled = []
    monkeypatch.setattr(InfiniteWorldTransformer, "compile_blocks", lambda self: compiled.append(self))
    infworld.load(small, "cpu", compile=True)
    assert compiled == []
    change_record(copied, torch="2.7.0")
    assert compiled == [infworld.load(copied, "cpu", compile=True).transformer]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, spoil, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_package_is_named_and_not_used(copied, world, caplog, damage):
    damage(next(copied.parent.rglob("noisy_step/*.pt2")))
    model = infworld.load(copied, "cpu").transformer
    assert not packaged(model)
    (line,) = warnings(caplog)
    assert "is damaged" in line and str(copied.parent) in line
    assert difference(velocity(model, 1), velocity(world.transformer, 1)) == 0


@pytest.mark.parametrize("text", ["", "[]", "{}", "7"])
def test_a_record_that_is_none_is_named(copied, caplog, text):
    next(copied.parent.rglob(packages.RECORD)).write_text(text)
    assert not packaged(infworld.load(copied, "cpu").transformer)
    assert "is damaged" in caplog.text


def test_a_package_that_cannot_be_tried_is_no_harm(copied, monkeypatch, caplog):
    """For want of a compiler, or of a helper library that has what it had."""
    monkeypatch.setattr(packages, "_Code", lambda path: 1 / 0)
    assert not packaged(infworld.load(copied, "cpu").transformer)
    assert warnings(caplog) == ["the blocks compiled ahead of time do not work here"]


def test_a_package_that_fails_in_a_film_is_left_behind(copied, world, caplog):
    """What looks whole may still not load, for want of a library or of memory; that is said once."""
    model = infworld.load(copied, "cpu").transformer
    for path in copied.parent.rglob("*.pt2"):
        path.write_bytes(b"no package")
    for latents in MEMORIES:
        assert difference(velocity(model, latents), velocity(world.transformer, latents)) == 0
    assert warnings(caplog) == len(packages.STEPS) * ["the blocks compiled ahead of time do not work here"]


@pytest.mark.parametrize("allowed", [0.0, float("nan")])
def test_a_package_that_computes_something_else_is_not_recorded(copied, monkeypatch, allowed):
    """Compiling leaves as it is what was compiled before."""
    monkeypatch.setattr(torch.export, "export", lambda *inputs, **options: None)
    monkeypatch.setattr(spaces, "aoti_compile_and_save", lambda *inputs, **options: None)
    (record,) = copied.parent.glob(f"*/{packages.RECORD}")
    arguments = load_config(copied), torch.device("cpu"), torch.float32, record.parent
    assert packages.make(*arguments) < 1e-5
    assert record.exists()
    monkeypatch.setitem(packages.ALLOWED, torch.float32, allowed)
    with pytest.raises(ValueError, match="deviate by"):
        packages.make(*arguments)
    assert not record.exists()
    assert not packaged(infworld.load(copied, "cpu").transformer)


def test_a_package_goes_up_with_a_space_and_weights_do_not(tmp_path):
    names = (
        "app.py",
        "checkpoints/world.ckpt",
        *(f"checkpoints/blocks-x/{name}" for name in (packages.RECORD, "a.pt2")),
    )
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(PROJECT_ROOT / ".gitignore", tmp_path)
    files, _ = upload_to_hf.project_files(tmp_path, released_weights=False)
    assert {file.name for file in files} == {".gitignore", *names} - {"checkpoints/world.ckpt"}


def test_a_package_needs_the_instructions_of_the_cpu_it_was_made_on(tmp_path):
    cpus = tmp_path / "cpuinfo"
    cpus.write_text("processor : 0\nflags : fpu avx2 ibrs fma avx512f\nprocessor : 1\n")
    assert packages._instructions(cpus) == ["avx2", "avx512f", "fma"]
    assert packages._instructions(tmp_path / "none") == []
