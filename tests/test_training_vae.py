"""The VAE learns, its export is the same VAE with normalised latents, and a stopped run goes on."""

import copy
import json

import pytest
import torch
from PIL import Image

from infworld.checkpoint import load_strict, read_metadata, read_tensors, save_tensors
from infworld.training.optim import EMA, Muon, lr_at, orthogonalize
from infworld.training.train_vae import (
    Autoencoder,
    channel_statistics,
    fold,
    identity_vae,
    load_weights,
    make_optimizers,
    parse_args,
    train,
    vae_losses,
)


def pictures(count: int = 4, frames: int = 5) -> torch.Tensor:
    """Video of moving colour ramps, (count, 3, frames, 16, 24) in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, 16), torch.linspace(0, 3, 24), indexing="ij")
    t = torch.arange(frames).view(1, 1, -1, 1, 1) / 4
    phase = torch.arange(3 * count).view(count, 3, 1, 1, 1)
    return torch.sin(x + phase + t) * torch.cos(y - phase)


def test_loss_falls():
    torch.manual_seed(0)
    model, video = Autoencoder(identity_vae(4)), pictures()
    optimizers = make_optimizers(model.vae, 2e-3)
    losses = []
    for _ in range(25):
        decoded, video, mean, logvar = model(video)
        parts = vae_losses(decoded, video, mean, logvar)
        losses.append(parts["square"].item())
        model.zero_grad()
        parts["loss"].backward()
        for optimizer in optimizers:
            optimizer.step()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_every_parameter_has_one_optimizer():
    model = Autoencoder(identity_vae(4))
    owned = [p for o in make_optimizers(model.vae, 1e-3) for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, owned)) == sorted(map(id, model.vae.parameters()))


@torch.no_grad()
def test_folding_normalises_the_latents_and_changes_nothing_else():
    torch.manual_seed(0)
    vae, video = Autoencoder(identity_vae(4)).vae.double(), pictures(frames=9).double()
    for p in (vae.conv1.weight, vae.conv1.bias):
        p.normal_()
    mean, logvar = vae.encode_distribution(video)
    decoded = vae.decode(mean)
    shift, scale = (s.double() for s in channel_statistics(mean))
    fold(vae, shift, scale)
    folded_mean, folded_logvar = vae.encode_distribution(video)
    shift, scale = shift.view(-1, 1, 1, 1), scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(folded_mean, (mean - shift) / scale)
    torch.testing.assert_close(folded_logvar, logvar - 2 * scale.log())
    torch.testing.assert_close(vae.decode(folded_mean), decoded)
    for statistic, expected in zip(channel_statistics(folded_mean), (0.0, 1.0), strict=True):
        assert (statistic - expected).abs().max() < 1e-4


SMALL = ["--size", "32", "48", "--dim", "4", "--frames", "10", "--walks", "2", "--unseen", "2", "--report-every", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run of a few seconds, stopped before its end in the eyes of a later run."""
    out = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    train(parse_args(["--out", str(out), "--minutes", "0.05", *SMALL]))
    return out


def entries(folder, event):
    lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [entry for entry in lines if entry["event"] == event]


def test_a_run_writes_weights_that_load_strictly(run):
    weights = read_tensors(run / "vae.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.float16}
    vae = load_strict(lambda: identity_vae(4), weights, where="vae.safetensors", dtype=torch.float32)
    assert vae.decode(vae.encode(pictures(1))[0]).shape == (1, 3, 5, 16, 24)
    assert Image.open(run / "samples-toy.png").size == (6 * 48, 2 * 2 * 32)
    done = entries(run, "done")[-1]
    assert abs(done["psnr_toy"] - done["psnr_unfolded_toy"]) < 0.05


def test_a_stopped_run_goes_on(run, tmp_path):
    stopped = tmp_path / "resume.safetensors"
    save_tensors(stopped, read_tensors(run / "resume.safetensors"), {"step": "1000", "progress": "0.9"})
    train(parse_args(["--out", str(tmp_path), "--minutes", "0.05", "--resume", str(stopped), *SMALL]))
    assert entries(tmp_path, "done")[-1]["step"] > 1000
    assert all(report["lr"] <= 0.1 * 3e-3 and report["frames"] == 81 for report in entries(tmp_path, "report"))


def test_a_finished_run_starts_a_new_schedule(run):
    assert read_metadata(run / "resume.safetensors")["progress"] == "1.0"
    assert load_weights(identity_vae(4), run / "resume.safetensors")["progress"] == 0


def test_a_decoder_alone_learns_to_decode_the_same_latents(run, tmp_path):
    critic = ["--critic", "0.5", "--critic-from", "0", "--texture", "1"]
    vae = run / "vae.safetensors"
    train(
        parse_args(
            ["--out", str(tmp_path), "--minutes", "0.05", "--resume", str(vae), "--decoder-only", *critic, *SMALL]
        )
    )
    before, after = read_tensors(vae), read_tensors(tmp_path / "vae.safetensors")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "conv2"}


def test_a_decoder_alone_needs_an_encoder(tmp_path):
    with pytest.raises(ValueError, match="--decoder-only keeps the encoder of a trained VAE: name one by --resume"):
        train(parse_args(["--out", str(tmp_path), "--minutes", "0.05", "--decoder-only", *SMALL]))


@pytest.mark.parametrize("shape", [(2, 8, 30), (1, 30, 8), (3, 16, 16)])
def test_orthogonalize_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.3 and values.max() < 1.3


def test_muon_steps_have_the_size_of_adamw_steps_and_survive_saving():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 64), (16, 8, 3, 3), (64, 64))]
    muon = Muon(params, lr=0.01)
    for p in params:
        p.grad = torch.randn_like(p)
    muon.step()
    assert all(0.1 < p.square().mean().sqrt() / 0.01 < 0.3 for p in params)
    again = Muon([torch.nn.Parameter(p.detach().clone()) for p in params], lr=0.01)
    again.load_state_dict(copy.deepcopy(muon.state_dict()))
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        q.grad = p.grad = torch.randn_like(p)
    muon.step()
    again.step()
    assert all(map(torch.equal, params, again.param_groups[0]["params"]))


def test_the_average_follows_and_is_kept():
    model = torch.nn.Linear(2, 2)
    ema = EMA(model, 0.9)
    start = ema.state_dict()["weight"].clone()
    model.weight.data += 1
    ema.update()
    moved = ema.state_dict()["weight"] - start
    assert (moved > 0.5).all() and (moved < 1).all()
    for _ in range(200):
        ema.update()
    other = torch.nn.Linear(2, 2)
    ema.copy_to(other)
    torch.testing.assert_close(other.weight, model.weight)
    settled = EMA(other, 0.9)
    settled.load_state_dict(ema.state_dict())
    other.weight.data += 1
    settled.update()
    torch.testing.assert_close(settled.state_dict()["weight"], model.weight + 0.1)


def test_learning_rate_warms_up_and_ends_at_zero():
    assert lr_at(0.0, step=0, warmup=10) == 0.1
    assert lr_at(0.5, step=100, warmup=10) == 0.5
    assert lr_at(1.0, step=100) == 0
