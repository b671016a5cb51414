"""The VAE computes the released one's numbers, and a clip may go through it in any pieces."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from infworld.vae import CausalConv3d, FeatureCache, VideoVAE, _convolve

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
MANIFEST = json.loads((HERE / "checkpoint_manifest.json").read_text())["models/Wan2.1_VAE.pth"]
IO = load_file(GOLDEN / "vae_io.safetensors")


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    """The golden VAE in float64, so that what has to be equal differs by 1e-12 and not by rounding."""
    return golden_vae().double()


def golden_vae() -> VideoVAE:
    vae = VideoVAE(**json.loads((GOLDEN / "config.json").read_text())["vae"])
    vae.load_state_dict(load_file(GOLDEN / "vae_weights.safetensors"))
    return vae.eval().requires_grad_(False)


def video(frames: int, batch: int = 1, height: int = 16, width: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, height, width, generator=generator, dtype=torch.float64) * 2 - 1


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of `b`."""
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("clip", ["T1", "T5", "T17"])
def test_encode_equals_the_reference(clip):
    latents, _ = golden_vae().encode(IO[f"{clip}.video"])
    assert difference(latents, IO[f"{clip}.latents"]) < 1e-5


@pytest.mark.parametrize("clip", ["T1", "T5", "T17"])
def test_decode_equals_the_reference(clip, vae):
    # These weights amplify rounding: the float32 reference itself is up to 1.8e-5 away from the float64 result.
    z, decoded = IO[f"{clip}.latents"], IO[f"{clip}.decoded"]
    assert difference(golden_vae().decode(z), decoded) < 3e-5
    assert difference(vae.decode(z.double()), decoded.double()) < 2e-5


def test_names_and_shapes_are_the_released_ones():
    with torch.device("meta"):
        state = VideoVAE().state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == MANIFEST


@pytest.mark.parametrize("tile", [1, 2, 3])
def test_tiles_do_not_change_the_result(vae, tile):
    x = video(29, batch=2)
    whole, whole_state = vae.encode(x, tile=100)
    latents, state = vae.encode(x, tile=tile)
    assert difference(latents, whole) < 1e-12
    assert state.keys() == whole_state.keys()
    assert all(difference(state[name], whole_state[name]) < 1e-12 for name in state)
    assert difference(vae.decode(whole, tile=tile), vae.decode(whole, tile=100)) < 1e-10


@pytest.mark.parametrize("splits", [(1, 28), (5, 4, 20), (9, 20), (1, 4, 4, 4, 16)])
def test_streamed_encoding_equals_the_whole(vae, splits):
    x = video(29)
    whole, _ = vae.encode(x)
    state, latents = None, []
    for part in x.split(splits, dim=2):
        added, state = vae.encode(part, state)
        latents.append(added)
    assert difference(torch.cat(latents, dim=2), whole) < 1e-12


def test_one_state_serves_two_continuations_and_survives_copies(vae):
    x = video(13)
    whole, _ = vae.encode(x)
    _, state = vae.encode(x[:, :, :5])
    copied = {name: torch.from_numpy(state[name].numpy().copy()) for name in reversed(state)}
    other, _ = vae.encode(video(8), state)
    again, _ = vae.encode(x[:, :, 5:], copied)
    assert difference(again, whole[:, :, 2:]) < 1e-12
    assert difference(other, whole[:, :, 2:]) > 1e-2


def all_tails(vae: VideoVAE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every layer of the encoder carries on after a clip: an earlier version's state."""
    cache = FeatureCache()
    vae.encoder(x.movedim(1, -1), cache)
    return cache.state


@pytest.mark.parametrize("frames", [1, 5, 17, 21, 29])
def test_the_tails_that_a_state_leaves_out_come_back(vae, frames):
    x = video(frames)
    _, state = vae.encode(x)
    assert state["frames"].shape[1] == min(frames, 19)
    cache = all_tails(vae, x)
    made = vae.encoder.full_rate_features(state["frames"])
    assert made.keys() | state.keys() == cache.keys() | {"frames"} and not made.keys() & state.keys()
    assert all(difference(features, cache[name]) < 1e-12 for name, features in made.items() if cache[name].any())


def test_a_state_of_the_released_sizes_is_a_quarter_of_the_tails():
    with torch.device("meta"):
        vae, x = VideoVAE(), torch.empty(1, 3, 21, 448, 896)
        states = vae.encode(x)[1], all_tails(vae, x)
    sizes = [sum(tensor.numel() for tensor in state.values()) for state in states]
    assert sizes[0] <= 0.25 * sizes[1] and sizes[0] == 140_894_208


def test_a_state_of_an_earlier_version_still_serves(vae):
    x = video(49)
    whole, state = vae.encode(x)
    added, now = vae.encode(x[:, :, 29:], all_tails(vae, x[:, :, :29]))
    assert difference(added, whole[:, :, 8:]) < 1e-12
    assert all(difference(now[name], state[name]) < 1e-12 for name in state)
    with pytest.raises(ValueError, match="earlier version is continued by 20 frames or more, not 16"):
        vae.encode(x[:, :, 29:45], all_tails(vae, x[:, :, :29]))


def test_a_state_may_come_from_another_dtype(vae):
    x = video(29)
    whole, _ = vae.encode(x)
    _, half = golden_vae().bfloat16().encode(x[:, :, :9].float())
    added, state = golden_vae().encode(x[:, :, 9:].float(), half)
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert (added - whole[:, :, 3:]).square().mean() < 1e-3 * whole.square().mean()


def test_state_shares_no_memory_with_the_video(vae):
    _, state = vae.encode(video(17), tile=100)
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


def test_later_frames_never_change_earlier_latents_or_frames(vae):
    x = video(17)
    changed = x.clone()
    changed[:, :, 9:] *= -1
    a, b = vae.encode(x)[0], vae.encode(changed)[0]
    assert torch.equal(a[:, :, :3], b[:, :, :3])
    assert difference(a[:, :, 3:], b[:, :, 3:]) > 1e-2
    z = a.clone()
    z[:, :, 3:] *= -1
    assert torch.equal(vae.decode(a)[:, :, :9], vae.decode(z)[:, :, :9])


def test_raw_and_normalised_agree(vae):
    x = video(5)
    latents, _ = vae.encode(x)
    mean, logvar = vae.encode_distribution(x)
    assert mean.shape == logvar.shape == latents.shape
    std, shift = (torch.tensor(c).view(1, -1, 1, 1, 1).double() for c in (vae.latents_std, vae.latents_mean))
    assert difference((mean - shift) / std, latents) < 1e-6
    assert difference(vae.decode_raw(mean).clamp(-1, 1), vae.decode(latents)) < 1e-4


def test_every_parameter_learns():
    vae = VideoVAE(dim=4)
    mean, logvar = vae.encode_distribution(video(5).float())
    vae.decode_raw(mean + torch.randn_like(mean) * (0.5 * logvar).exp()).square().mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bfloat16_is_close_to_float32():
    vae = golden_vae()
    x, z = IO["T5.video"], IO["T5.latents"]
    latents, decoded = vae.encode(x)[0], vae.decode(z)
    half = golden_vae().bfloat16()
    assert half.encode(x)[0].dtype == half.decode(z).dtype == torch.float32
    assert (half.encode(x)[0] - latents).square().mean() < 1e-3 * latents.square().mean()
    assert (half.decode(z) - decoded).square().mean() < 1e-2 * decoded.square().mean()


@pytest.mark.parametrize("kernel, stride", [((3, 3, 3), (1, 1, 1)), ((3, 1, 1), (1, 1, 1)), ((3, 1, 1), (2, 1, 1))])
@torch.no_grad()
def test_cpu_convolution_equals_conv3d(kernel, stride):
    conv = CausalConv3d(5, 7, kernel, stride=stride)
    x = torch.randn(2, 5, 9, 6, 8)
    pad = kernel[-1] // 2
    expected = torch.nn.functional.conv3d(x, conv.weight, conv.bias, stride, (0, pad, pad))
    assert difference(_convolve(x.movedim(1, -1), conv).movedim(-1, 1), expected) < 1e-5


def test_training_passes_keep_no_tails():
    cache = FeatureCache(keep=False)
    assert cache.swap(torch.zeros(1, 4, 2, 2, 1), 2) is None
    assert cache.state == {}


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 4, 5, 16, 16), "B 3 T H W"),
        ((3, 5, 16, 16), "B 3 T H W"),
        ((1, 3, 4, 16, 16), r"1 \+ 4n frames, got 4"),
        ((1, 3, 0, 16, 16), r"1 \+ 4n frames, got 0"),
        ((1, 3, 5, 20, 16), "20x16: crop"),
        ((1, 3, 5, 16, 9), "16x9: crop"),
        ((1, 3, 5, 0, 16), "0x16: crop"),
    ],
)
def test_bad_clips_are_named(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_bad_continuations_are_named(vae):
    _, state = vae.encode(video(1))
    for frames in (0, 1, 5):
        with pytest.raises(ValueError, match="continued by 4n frames"):
            vae.encode(torch.zeros(1, 3, frames, 16, 24), state)
    with pytest.raises(ValueError, match="not of a clip of batch 1 and size 24x24"):
        vae.encode(torch.zeros(1, 3, 4, 24, 24), state)
    with pytest.raises(ValueError, match="not of a clip of batch 2"):
        vae.encode(torch.zeros(2, 3, 4, 16, 24), state)
    with pytest.raises(ValueError, match="state is of nothing"):
        vae.encode(torch.zeros(1, 3, 4, 16, 24), {"history": torch.zeros(1)})


@pytest.mark.parametrize("shape", [(1, 15, 2, 2, 3), (16, 2, 2, 3), (1, 16, 0, 2, 3)])
def test_bad_latents_are_named(vae, shape):
    with pytest.raises(ValueError, match="B 16 T h w"):
        vae.decode(torch.zeros(shape))


def test_normalisation_needs_one_number_per_channel():
    with pytest.raises(ValueError, match="15 and 16 numbers; z_dim is 16"):
        VideoVAE(dim=4, latents_mean=(0.0,) * 15)


# --- squares of pixels as one


@pytest.fixture(scope="module")
def folded() -> VideoVAE:
    torch.manual_seed(0)
    sizes = {"z_dim": 6, "dim_mult": (1, 2, 3), "latents_mean": (0.0,) * 6, "latents_std": (1.0,) * 6}
    return VideoVAE(dim=4, fold=4, **sizes).double().eval().requires_grad_(False)


def test_folded_pictures_make_coarser_latents(folded):
    x = video(9, height=32, width=48)
    latents, _ = folded.encode(x)
    assert folded.space == 16 and latents.shape == (1, 6, 3, 2, 3)
    assert folded.decode(latents).shape == x.shape
    with pytest.raises(ValueError, match="24x48: crop height and width to multiples of 16"):
        folded.encode(x[..., :24, :])


def test_a_folded_clip_may_come_in_pieces(folded):
    x = video(25, height=32, width=48)
    whole, _ = folded.encode(x)
    first, state = folded.encode(x[:, :, :5])
    second, state = folded.encode(x[:, :, 5:17], state)
    third, _ = folded.encode(x[:, :, 17:], state)
    assert difference(torch.cat([first, second, third], dim=2), whole) < 1e-12
    assert difference(folded.decode(whole, tile=1), folded.decode(whole, tile=100)) < 1e-12
    with pytest.raises(ValueError, match="not of a clip of batch 1 and size 32x32"):
        folded.encode(x[:, :, 5:9, :, :32], state)


def test_folding_puts_every_pixel_back(folded):
    x = video(5, height=32, width=48)
    there = folded._fold(x)
    assert there.shape == (1, 5, 8, 12, 48) and torch.equal(folded._unfold(there), x)
    square = x[0, :, 2, 4:8, 8:12]  # of the second row and the third column of squares
    assert torch.equal(there[0, 2, 1, 2], square.flatten())
