"""Weight files: every format is read, every wrong one is named, loading is strict, saving is atomic."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tarfile
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from infworld import checkpoint
from infworld.checkpoint import RELEASED_EXTRAS, check_file, load_strict, read_metadata, read_tensors, save_tensors
from infworld.config import TextConfig, TransformerConfig
from infworld.dit import InfiniteWorldTransformer
from infworld.text import build_umt5, umt5_names
from infworld.vae import VideoVAE

MANIFEST = json.loads((Path(__file__).parent / "checkpoint_manifest.json").read_text())
WEIGHTS = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3), "b.weight": torch.randn(1, 3)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 3)
        self.b = nn.Linear(3, 1, bias=False)
        self.register_buffer("angles", torch.linspace(0, 1, 4, dtype=torch.float64, device="cpu"), persistent=False)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.pth"])
def test_every_format_is_read(tmp_path, name):
    assert same(read_tensors(write(tmp_path, name)), WEIGHTS)


def test_torch_file_may_be_nested_old_and_hold_other_things(tmp_path):
    torch.save({"state_dict": {**WEIGHTS, "step": 3}, "epoch": 7, "optimizer": {"lr": 0.1}}, tmp_path / "nested.ckpt")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "nested.ckpt"), WEIGHTS)
    assert same(read_tensors(tmp_path / "old.pth"), WEIGHTS)


def test_tensor_beside_the_state_dict_is_not_lost(tmp_path):
    torch.save({"state_dict": WEIGHTS, "beside": torch.ones(1)}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="1 extra: beside"):
        load_strict(Net, read_tensors(tmp_path / "w.ckpt"), where="w.ckpt")


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.pth"])
@pytest.mark.parametrize("keep", [0, 5, 200, -20])
def test_truncated_file_is_named(tmp_path, name, keep):
    path = write(tmp_path, name)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{path}.*download it again"):
        read_tensors(path)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncated_torch_file_is_told_apart_at_once_with_its_sizes(tmp_path, monkeypatch, nested, dtype):
    weights = {f"w{i}": torch.randn(1000, 100).to(dtype) for i in range(4)} | {"view": torch.ones(9)[:3]}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": weights, "epoch": argparse.Namespace(a=1)} if nested else weights, path)
    whole = path.read_bytes()
    assert check_file(path) == path
    monkeypatch.setattr(torch, "load", None)  # nothing is read
    path.write_bytes(whole[: len(whole) // 2])
    tensors = 400_000 * dtype.itemsize + 9 * 4  # a storage is kept whole
    with pytest.raises(ValueError, match=f"{path} is truncated: it has {len(whole) // 2:,} bytes of {tensors:,} or"):
        check_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"it has {len(whole) - 1:,} bytes of .* or more; .*infworld download"):
        check_file(path)


@pytest.mark.parametrize("change", [lambda whole: whole[:-1], lambda whole: whole + b"x", lambda whole: whole[:90]])
def test_safetensors_file_of_another_length_is_told_with_both(tmp_path, change):
    path = write(tmp_path, "w.safetensors")
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    with pytest.raises(ValueError, match=f"{path} is truncated"):
        check_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"has {len(whole) - 1:,} bytes and not {len(whole):,}; .*infworld download"):
        check_file(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "w.pth"])
@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(300)])
def test_foreign_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is truncated or not a (safetensors|torch) checkpoint"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt"])
def test_git_lfs_pointer_is_recognised(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_tensors(tmp_path / name)


def test_code_in_a_torch_file_is_not_run(tmp_path):
    torch.save({"weights": argparse.Namespace(a=1)}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match="not a torch checkpoint"):
        read_tensors(tmp_path / "w.ckpt")


@pytest.mark.parametrize(
    ("content", "message"), [({"model": {"a": 1}}, "no tensors .*found: model"), ([1, 2], "holds a list")]
)
def test_torch_file_without_named_tensors_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "w.ckpt")


def test_wrong_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weight file at .*nowhere.ckpt"):
        read_tensors(tmp_path / "nowhere.ckpt")
    with pytest.raises(ValueError, match="w.onnx is no weight file by its name: known are .safetensors, .ckpt, .pth"):
        read_tensors(tmp_path / "w.onnx")
    with pytest.raises(ValueError, match="is a folder"):
        read_tensors(tmp_path)


class Harmful:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_code_in_a_file_is_refused_by_name_and_not_recommended(tmp_path, nested, zipped):
    content = {**WEIGHTS, "x": Harmful(tmp_path / "ran")}
    content = {"state_dict": content} if nested else content
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="not a torch checkpoint of tensors alone: posix.system in it") as refusal:
        read_tensors(tmp_path / "w.pth")
    said = "".join(traceback.format_exception(refusal.value))
    assert "load failed" not in said and "set to `False`" not in said
    assert not (tmp_path / "ran").exists()


def test_other_things_than_tensors_are_refused_without_advice_to_load_them(tmp_path):
    torch.save({**WEIGHTS, "args": argparse.Namespace(lr=1)}, tmp_path / "args.ckpt")
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "script.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(pickle.dumps(Harmful(tmp_path / "ran"), 2)[:-3])
    (tmp_path / "text.ckpt").write_text("hello " * 100)
    with tarfile.open(tmp_path / "tar.ckpt", "w") as tar:
        tar.add(tmp_path / "text.ckpt", "storages")
    for path in sorted(tmp_path.glob("*.ckpt")):
        with pytest.raises(ValueError, match=f"{path} is (truncated or )?not a torch checkpoint") as refusal:
            read_tensors(path)
        assert "set to `False`" not in "".join(traceback.format_exception(refusal.value))
    assert not (tmp_path / "ran").exists()


def test_loaded_module_has_the_tensors_and_its_own_constants():
    net = load_strict(Net, {**WEIGHTS, "pos_embed": torch.ones(1)}, where="here", drop=RELEASED_EXTRAS)
    assert same(net.state_dict(), WEIGHTS)
    assert net.angles[-1] == 1 and not net.training and net.a.weight.requires_grad


def test_dtype_is_for_weights_and_leaves_constants_alone():
    net = load_strict(Net, WEIGHTS, where="here", dtype=torch.bfloat16)
    assert net.a.weight.dtype == torch.bfloat16 and net.angles.dtype == torch.float64


def test_misfit_names_what_is_missing_extra_and_misshapen():
    wrong = {
        "a.weight": torch.ones(2, 2),
        "b.weight": WEIGHTS["b.weight"],
        **{f"c{i}": torch.ones(1) for i in range(9)},
    }
    with pytest.raises(ValueError) as error:
        load_strict(Net, wrong, where="some.ckpt")
    text = str(error.value)
    assert text.startswith("some.ckpt does not fit the model")
    assert "1 missing: a.bias" in text and "9 extra: c0, c1, c2, c3 and 5 more" in text
    assert "1 misshapen: a.weight is (2, 2) instead of (3, 2)" in text


def test_saved_file_comes_back_with_its_metadata(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"left": whole[:, :2], "right": whole[:, 1:], "last": whole[-1]}  # views that share memory
    save_tensors(tmp_path / "new" / "s.safetensors", tensors, {"made": "here"})
    assert same(read_tensors(tmp_path / "new" / "s.safetensors"), tensors)
    assert read_metadata(tmp_path / "new" / "s.safetensors") == {"made": "here"}
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.safetensors"]


def test_saved_file_is_what_the_format_says(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16)
    tensors = {str(kind): torch.arange(5).to(kind) for kind in (*kinds, torch.int8, torch.uint8, torch.bool)}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "turned": torch.arange(6.0).reshape(2, 3).T}
    save_tensors(tmp_path / "s.safetensors", tensors)
    found = load_file(tmp_path / "s.safetensors")
    assert same(found, tensors) and all(found[name].dtype == tensors[name].dtype for name in tensors)


def test_numbers_are_rounded_on_the_way_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_PIECE", 2)  # so that even these tensors go in pieces
    written = []
    tensors = {**WEIGHTS, "steps": torch.arange(3)}
    save_tensors(tmp_path / "s.safetensors", tensors, dtype=torch.bfloat16, progress=written.append)
    rounded = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    assert same(read_tensors(tmp_path / "s.safetensors"), {**rounded, "steps": tensors["steps"]})
    assert sum(written) == 12 * 2 + 3 * 8 and len(written) > len(tensors)


def test_file_can_be_saved_over_itself_while_it_is_in_use(tmp_path):
    path = tmp_path / "s.safetensors"
    save_tensors(path, WEIGHTS)
    for _ in range(2):
        save_tensors(path, read_tensors(path))
    assert same(read_tensors(path), WEIGHTS)


def test_failed_save_names_the_place_and_leaves_what_was_there(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "taken.safetensors").mkdir()
    for path in (tmp_path / "file" / "s.safetensors", tmp_path / "taken.safetensors"):
        with pytest.raises(ValueError, match=f"cannot write {path}"):
            save_tensors(path, WEIGHTS)
    with pytest.raises(ValueError, match="saved as .safetensors, not as .pth"):
        save_tensors(tmp_path / "s.pth", WEIGHTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken.safetensors"]


def test_metadata_is_only_in_safetensors(tmp_path):
    with pytest.raises(ValueError, match="only a .safetensors file has metadata"):
        read_metadata(write(tmp_path, "w.ckpt"))


LOADING = """
import sys, threading, time, torch
from torch import nn
from infworld.checkpoint import load_strict, read_tensors, save_tensors

def held():  # bytes that are this process's own; pages of mapped files are not, the system may drop them
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.001)

path, action = sys.argv[1:]
build = lambda: nn.ModuleList(nn.Linear(4096, 4096, bias=False) for _ in range(4))
torch.ones(9, 9) @ torch.ones(9, 9)
before = most = held()
threading.Thread(target=watch, daemon=True).start()
if action == "load":
    net = load_strict(build, read_tensors(path), where=path)
    sum(p.sum() for p in net.parameters())
else:
    save_tensors(action, read_tensors(path), dtype=torch.bfloat16)
print((most - before) / 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_is_never_whole_in_memory(tmp_path, suffix):
    """Of 256 MB, loading needs next to nothing, and converting one piece at a time."""
    path = tmp_path / f"w{suffix}"
    weights = {f"{i}.weight": torch.ones(4096, 4096) for i in range(4)}
    (save_file if suffix == ".safetensors" else torch.save)(weights, path)
    for action, most in (("load", 64), (tmp_path / "converted.safetensors", 150)):
        command = [sys.executable, "-c", LOADING, str(path), str(action)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert float(done.stdout) < most


@pytest.mark.parametrize(
    ("file", "build", "rename"),
    [
        ("infinite_world_model.ckpt", lambda: InfiniteWorldTransformer(TransformerConfig()), dict),
        ("models/Wan2.1_VAE.pth", lambda: VideoVAE(), dict),
        ("models/models_t5_umt5-xxl-enc-bf16.pth", lambda: build_umt5(TextConfig()), umt5_names),
    ],
)
def test_released_names_and_shapes_are_the_modules_own(file, build, rename):
    with torch.device("meta"):
        module = build()
    released = rename(MANIFEST[file])
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == released


def test_released_transformer_loads_on_meta_and_drops_the_extras():
    with torch.device("meta"):
        released = {name: torch.empty(shape) for name, shape in MANIFEST["infinite_world_model.ckpt"].items()}
        extras = {name: torch.empty(1, 5) for name in RELEASED_EXTRAS}
    build = lambda: InfiniteWorldTransformer(TransformerConfig())  # noqa: E731
    model = load_strict(build, released | extras, where="released", device="meta", drop=RELEASED_EXTRAS)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.447e9, rel=1e-3)


NAMELESS = """
import os, sys
os.setresuid(54321, 0, 0)  # as the real user, whose name is asked for; the files stay readable
import infworld
from infworld.text import embeddings_folder
print(infworld.load("tiny").config.name, embeddings_folder().name)
"""


@pytest.mark.skipif(not hasattr(os, "setresuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_a_user_without_name_and_home_loads_models():
    """As in a container that runs as a number."""
    unnamed = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unnamed}
    command = [sys.executable, "-c", NAMELESS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment)
    assert done.stdout.split() == ["tiny", "text"], done.stderr
