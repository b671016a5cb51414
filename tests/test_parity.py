"""`infworld check-parity`: the engine passes on the golden folder, and tampering of any kind does not."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from infworld.cli import check_parity

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden_copy(tmp_path) -> Path:
    for file in GOLDEN.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


@pytest.fixture
def only(monkeypatch):
    """Leaves out the checks that a test is not about, to save their time."""
    every = dict(check_parity.CHECKS)
    return lambda *files: monkeypatch.setattr(check_parity, "CHECKS", {file: every[file] for file in files})


def change(folder: Path, file: str, name: str, change) -> None:
    """Writes `file` anew with one tensor changed, or without it where `change` gives None."""
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    path.unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items() if tensor is not None}, path)


def add_to_one(amount: float):
    """A change of one element, the middle one."""

    def add(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] += amount
        return tensor

    return add


def test_engine_matches_every_golden_tensor(capsys):
    assert check_parity.main([str(GOLDEN)]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert summary.startswith(f"PASS: {len(lines)} tensors")
    expected = {
        f"{file}.{name}"
        for file in check_parity.CHECKS
        for name in load_file(GOLDEN / f"{file}.safetensors")
        if re.search(
            r"hidden|velocity|compressed|embedding|decoded|video_|rollout\.latents|T\d+\.latents", f"{file}.{name}"
        )
    }
    assert {line.split()[0] for line in lines} == expected
    for line in lines:
        assert re.fullmatch(r"\S+( \(\w+\))? +\d\.\d\de[-+]\d\d of \d\.\de[-+]\d\d", line), line


# Check that sees it: (changed file, tensor, change, what must be named), ...
TAMPERED = {
    "vae weight": ("vae_io", [("vae_weights", "encoder.conv1.weight", add_to_one(1e-3), "vae_io.T5.latents")]),
    "vae results": (
        "vae_io",
        [
            ("vae_io", "T1.latents", add_to_one(1e-3), "vae_io.T1.latents"),
            ("vae_io", "T17.decoded", add_to_one(1e-3), "vae_io.T17.decoded"),
        ],
    ),
    "vae result missing": ("vae_io", [("vae_io", "T5.latents", lambda t: None, "T5 lacks latents")]),
    "umt5 weight": (
        "t5_io",
        [("t5_weights", "blocks.1.pos_embedding.embedding.weight", lambda t: t * 1.001, "t5_io.hidden")],
    ),
    "transformer weight": (
        "dit_io",
        [("dit_weights", "blocks.1.ffn.0.weight", add_to_one(1e-2), "dit_io.T21.velocity (cached)")],
    ),
    "transformer weight missing": (
        "dit_io",
        [("dit_weights", "head.head.bias", lambda t: None, "1 missing: head.head.bias")],
    ),
    "transformer results": (
        "dit_io",
        [
            ("dit_io", "T80.velocity", add_to_one(1e-3), "dit_io.T80.velocity (plain), dit_io.T80.velocity (cached)"),
            ("dit_io", "hpmc5.compressed", lambda t: t[:, :, :1], "dit_io.hpmc5.compressed"),
            ("dit_io", "action.embedding", lambda t: t * float("nan"), "dit_io.action.embedding"),
        ],
    ),
    "compressor input missing": ("dit_io", [("dit_io", "hpmc64.latents", lambda t: None, "hpmc64 lacks latents")]),
    "bf16 result": (
        "dit_io_bf16",
        [("dit_io_bf16", "T1.velocity", lambda t: t * 1.05, "dit_io_bf16.T1.velocity")],
    ),
    "bf16 result missing": ("dit_io_bf16", [("dit_io_bf16", "T21.velocity", lambda t: None, "lacks T21.velocity")]),
    "rollout results": (
        "rollout",
        [
            ("rollout", "latents2", add_to_one(1e-2), "rollout.latents2"),
            ("rollout", "video_u8", lambda t: t // 3 * 3, "rollout.video_u8"),
            ("rollout", "video_last8", add_to_one(1e-2), "rollout.video_last8"),
        ],
    ),
    "rollout noise missing": ("rollout", [("rollout", "noise1", lambda t: None, "lacks noise1")]),
}


@pytest.mark.parametrize(("check", "changes"), TAMPERED.values(), ids=TAMPERED.keys())
def test_changed_tensors_fail_and_are_all_named(golden_copy, only, capsys, check, changes):
    only(check)
    for file, name, tamper, _ in changes:
        change(golden_copy, file, name, tamper)
    assert check_parity.main([str(golden_copy)]) == 1
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("FAIL:")
    for *_, named in changes:
        assert named in summary


def test_unknown_tensor_is_not_passed_over(golden_copy, only, capsys):
    only("t5_io")
    path = golden_copy / "t5_io.safetensors"
    tensors = load_file(path) | {"hidden_too": torch.zeros(1)}
    path.unlink()
    save_file(tensors, path)
    assert check_parity.main([str(golden_copy)]) == 1
    assert "t5_io: it has the unknown hidden_too" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("vae", "dim", 8, "misshapen: "),
        ("dit", "depth", 3, "unknown key 'depth'"),
        ("t5", "shared_pos", True, "shared_pos"),
    ],
)
def test_config_that_does_not_fit_is_named(golden_copy, only, capsys, section, key, value, named):
    only({"vae": "vae_io", "dit": "dit_io", "t5": "t5_io"}[section])
    config = json.loads((GOLDEN / "config.json").read_text())
    config[section][key] = value
    (golden_copy / "config.json").unlink()
    (golden_copy / "config.json").write_text(json.dumps(config))
    assert check_parity.main([str(golden_copy)]) == 1
    assert named in capsys.readouterr().out.splitlines()[-1]


def test_missing_files_fail_on_the_command_line_and_are_all_named(tmp_path):
    (tmp_path / "config.json").symlink_to(GOLDEN / "config.json")
    run = subprocess.run([sys.executable, "-m", "infworld", "check-parity", tmp_path], capture_output=True, text=True)
    assert run.returncode == 1
    summary = run.stdout.splitlines()[-1]
    assert summary.startswith("FAIL:")
    for file in ("vae_weights", "t5_io", "dit_weights", "rollout"):
        assert f"{file}.safetensors" in summary


def test_bfloat16_velocities_may_be_left_out_but_not_silently(golden_copy, only, capsys):
    only("t5_io", "dit_io_bf16")
    (golden_copy / "dit_io_bf16.safetensors").unlink()
    assert check_parity.main([str(golden_copy)]) == 0
    summary = capsys.readouterr().out.splitlines()[-1]
    assert summary.startswith("PASS: 1 tensors") and "dit_io_bf16 is not in this folder" in summary


def test_missing_config_fails(golden_copy, only, capsys):
    only("t5_io")
    (golden_copy / "config.json").unlink()
    assert check_parity.main([str(golden_copy)]) == 1
    assert "no config at" in capsys.readouterr().out.splitlines()[-1]


def test_bfloat16_convolution_in_float32_gives_what_torch_gives():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((1, 4, 3, 4, 4), (4, 4, 3, 3, 3), (4,)))
    theirs = torch.nn.functional.conv3d(x, weight, bias, padding=1)
    with check_parity.WideConvolutions():
        ours = torch.nn.functional.conv3d(x, weight, bias, padding=1)
        assert (x @ x).dtype == torch.bfloat16
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-2)
