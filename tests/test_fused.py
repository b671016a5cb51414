"""Kernels compute what plain torch does: by Triton's interpreter, which runs them on a CPU.

Triton decides when it is imported whether it interprets, so most of this file runs in a process of its own.
"""

import importlib.util
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from infworld import dit, fused, layers, vae
from infworld.config import load_config
from infworld.vae import build_vae

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed, 1 skipped" in done.stdout


def draw(*shape: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * 2 + offset).to(dtype)


def vectors(batch: int, width: int) -> tuple[torch.Tensor, ...]:
    return draw(batch, 6, width).chunk(6, dim=1)  # as a block has them


def cases(dtype: torch.dtype, batch: int, length: int, num_heads: int, head_dim: int) -> dict[str, tuple]:
    width = num_heads * head_dim
    x = draw(batch, length + 2, width, dtype=dtype, offset=0.5)
    inside, (shift, scale, gate, *_) = x[:, 1:-1], vectors(batch, width)  # a part of other tokens
    weight, rope = draw(width, dtype=dtype), layers.rope_3d(range(2), 1, 40, head_dim, x.device)[:, 3 : 3 + length]
    return {
        "modulate": (inside, shift, scale),
        "modulate_both": (x[:, :2], inside, shift[:1], scale[:1]),
        "gated_add": (inside, draw(batch, length, width, dtype=dtype), gate),
        "norm_heads": (inside, weight, num_heads, rope),
        "norm_heads, not rotated": (inside, weight, num_heads, None),
    }


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(12, 128), (6, 64), (3, 10)])
@pytest.mark.parametrize("batch", [1, 2])
def test_kernels_equal_plain_torch(dtype, num_heads, head_dim, batch):
    kernels = importlib.import_module(fused.KERNELS)
    for name, args in cases(dtype, batch, 5, num_heads, head_dim).items():
        function = name.split(",")[0]
        with torch.no_grad():
            expected, found = getattr(layers, function)(*args), getattr(kernels, function)(*args)
        assert found.shape == expected.shape and found.dtype == dtype, name
        assert found.stride()[1:] == expected.stride()[1:], name  # as attention wants heads to lie
        check_rounding(found, expected, name)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [96, 384, 20])
@pytest.mark.parametrize("silu", [True, False])
def test_the_vaes_norm_equals_plain_torch(dtype, width, silu):
    """Also where a pixel is nothing but zeros, and for numbers of pixels that no program's share divides."""
    kernels = importlib.import_module(fused.KERNELS)
    x, gamma = draw(1, 2, 5, 9, width, dtype=dtype), draw(width, 1, 1, 1, dtype=dtype)
    if dtype != torch.float16:  # in which both make it NaN
        x[0, 0, 0, 0] = 0
    with torch.no_grad():
        check_rounding(kernels.normalize(x, gamma, silu), vae.normalize(x, gamma, silu), "normalize")


def check_rounding(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """float16 shows that values are rounded where plain torch rounds them; the interpreter cuts bfloat16 off."""
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 4e-2}[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")
    if expected.dtype == torch.float16:
        assert (found != expected).float().mean() < 0.01, name


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels take part on a CPU too; but for the product with GELU, which is another there."""
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    kernels = importlib.import_module(fused.KERNELS)
    monkeypatch.setattr(kernels, "affine_gelu", lambda x, weight, bias: layers._gelu(layers.F.linear(x, weight, bias)))
    used = set()
    monkeypatch.setattr(
        fused, "_kernel", lambda function: used.add(function.__name__) or getattr(kernels, function.__name__)
    )
    return used


@interpreted
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_the_transformer_is_the_same(small_model, on_cpu, dtype, caplog):
    config = load_config(small_model).model_cfg
    torch.manual_seed(0)
    model = dit.InfiniteWorldTransformer(config).to(dtype)
    text, mask = draw(1, 5, config.caption_channels), torch.ones(1, 5)
    noisy, history = draw(1, config.out_channels, 3, 4, 6), draw(1, config.out_channels, 5, 4, 6)
    actions = torch.zeros(1, 9, dtype=torch.long)
    inputs = noisy, torch.tensor([500.0]), history, actions, actions, text, mask
    with fused.plain_torch():
        expected = model(*inputs)
    assert not on_cpu
    with caplog.at_level(logging.WARNING):
        found = model(*inputs)
    assert on_cpu == {"modulate", "modulate_both", "gated_add", "norm_heads", "affine_gelu"} and not caplog.records
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@interpreted
@torch.inference_mode()
def test_encoding_and_decoding_are_the_same(small_model, on_cpu, caplog):
    torch.manual_seed(0)
    model = build_vae(load_config(small_model).vae_cfg)
    video = draw(1, 3, 5, 16, 24).tanh()
    with fused.plain_torch():
        latents, _ = model.encode(video)
        decoded = model.decode(latents)
    assert not on_cpu
    torch.testing.assert_close(model.encode(video)[0], latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.decode(latents), decoded, rtol=1e-4, atol=1e-5)
    assert on_cpu == {"normalize"} and not caplog.records


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@pytest.fixture
def tried(monkeypatch):
    """A fused function whose kernel can be replaced: (function, kernels, sizes that the kernel was called with)."""
    kernels, sizes = SimpleNamespace(), []
    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "_said", set())
    monkeypatch.setattr(fused, "_kernel", lambda function: getattr(kernels, function.__name__))

    def kernel(x):
        sizes.append(len(x))
        return 2 * x

    kernels.doubled = kernel
    return fused.fused(small=lambda x: (x[:3],))(doubled), kernels, sizes


def test_a_kernel_is_tried_once_with_a_part_and_then_used(tried):
    function, _, sizes = tried
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(function(torch.ones(10, 4)), torch.full((10, 4), 2.0))
        function(torch.ones(10, 5))
    assert sizes == [3, 10, 10, 3, 10]  # another width is tried by itself


def test_plain_torch_computes_with_gradients_in_graphs_under_autocast_and_where_it_is_wanted(tried):
    function, _, sizes = tried
    x = torch.ones(10, 4, requires_grad=True)
    function(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad(), fused.plain_torch():
        function(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        function(x)

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    with torch.no_grad():
        torch.compile(Module(), fullgraph=True, backend="eager")(torch.ones(10, 4))
    assert sizes == []


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda x: 2.2 * x, "is off by 1.0e-01"),
        (lambda x: x * torch.nan, "is off by nan"),
        (lambda x: x[:1] * 2, "is off by"),
    ],
)
def test_a_wrong_kernel_is_left_out_and_named(tried, caplog, kernel, said):
    function, kernels, _ = tried
    kernels.doubled = kernel
    check_left_out(function, caplog, f"the kernel for doubled {said}")


def test_a_kernel_that_fails_is_left_out_and_named(tried, caplog):
    function, kernels, _ = tried

    def fails(x):
        raise RuntimeError("Failed to find C compiler\nmore")

    kernels.doubled = fails
    check_left_out(function, caplog, "plain torch takes their place: Failed to find C compiler")


def test_a_trial_without_memory_is_no_verdict(tried):
    function, kernels, _ = tried
    good = kernels.doubled

    def full(x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels.doubled = full
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        function(torch.ones(10, 4))
    kernels.doubled = good
    with torch.no_grad():
        assert torch.equal(function(torch.ones(10, 4)), torch.full((10, 4), 2.0))


def check_left_out(function, caplog, said: str) -> None:
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for width in (4, 4, 5):
            assert torch.equal(function(torch.ones(10, width)), torch.full((10, width), 2.0))
    (record,) = caplog.records
    assert said in record.getMessage()


def test_without_triton_there_is_no_warning(tried, caplog, monkeypatch):
    function, _, _ = tried

    def missing(function):
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(fused, "_kernel", missing)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert torch.equal(function(torch.ones(10, 4)), torch.full((10, 4), 2.0))
    assert not caplog.records


def test_a_wrapped_layer_is_not_bypassed(monkeypatch):
    """As a LoRA wraps it in training, whose validation has no gradients."""

    class Wrapped(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setattr(fused, "DEVICES", {"cpu"})
    monkeypatch.setattr(fused, "_kernel", lambda function: pytest.fail(function.__name__))
    layer, x = Wrapped(4, 6), draw(1, 5, 4)
    with torch.no_grad():
        assert torch.equal(layers.linear_gelu(x, layer), layers._gelu(layer(x)))
