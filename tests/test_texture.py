"""What keeps texture in a VAE's pictures, and latents that move as pictures do."""

import math

import pytest
import torch
import torch.nn.functional as F

from infworld.training.critic import Critic, critic_loss, judged_gradient
from infworld.training.equivariance import changed, shift_error, shifted
from infworld.training.measures import raster
from infworld.training.train_vae import roughness, vae_losses


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blurred(video: torch.Tensor) -> torch.Tensor:
    frames = F.avg_pool2d(video.transpose(1, 2).flatten(0, 1), 3, stride=1, padding=1)
    return frames.unflatten(0, (len(video), -1)).transpose(1, 2)


# --- roughness


def test_roughness_is_the_mean_step_between_neighbours():
    video = torch.zeros(1, 3, 2, 8, 16)
    video[..., 8::2] = 0.5  # stripes on the right half, of the same height everywhere
    rough = roughness(video)
    assert rough.shape == (2, 2, 1, 2)
    assert rough[:, 1].max() == 0  # nothing changes from row to row
    torch.testing.assert_close(rough[:, 0, 0], torch.tensor([[0.5 / 8, 0.5 * 7 / 8]]).expand(2, -1))


def test_another_texture_is_better_than_none():
    true, other = noise(1, 3, 5, 32, 32), noise(1, 3, 5, 32, 32, seed=1)
    mean = logvar = torch.zeros(1, 4, 2, 2, 2)
    plain = [vae_losses(video, true, mean, logvar)["loss"] for video in (other, blurred(true))]
    texture = [vae_losses(video, true, mean, logvar, texture=50.0)["loss"] for video in (other, blurred(true))]
    assert plain[0] > plain[1] and texture[0] < texture[1]


# --- raster


def grid(down: int, across: int, offset: int = 0, height: int = 96, width: int = 128) -> torch.Tensor:
    """1 at every `across`-th pixel of every `down`-th row, each such row `offset` pixels right of the one before."""
    row, column = torch.arange(height)[:, None], torch.arange(width)
    return ((row % down == 0) & ((column - row // down * offset) % across == 0)).float()


@pytest.mark.parametrize(("down", "across", "offset"), [(4, 4, 0), (3, 3, 0), (2, 5, 0), (4, 8, 4), (2, 6, 3)])
def test_a_raster_of_any_period_is_told_from_texture(down, across, offset):
    texture = (noise(2, 3, 96, 128, 3) * 20 + 128).byte()
    pattern = grid(down, across, offset)[..., None]
    assert (raster(texture) < 0.02).all()
    assert (raster((128 + 60 * pattern).expand(2, 3, -1, -1, 3).byte()) > 0.6).all()
    both = raster((texture.float() + 40 * pattern).byte())
    assert (both > 0.1).all() and (both < 0.9).all()


def test_edges_and_flat_pictures_have_no_raster():
    row, column = torch.arange(96)[:, None], torch.arange(128)
    edges = 200.0 * ((row // 37 + column // 41 + (row + column) // 29) % 2)
    assert (raster(edges[..., None].expand(1, 2, -1, -1, 3).byte()) < 0.05).all()
    assert (raster(torch.full((1, 2, 96, 128, 3), 80, dtype=torch.uint8)) == 0).all()


def test_a_small_picture_has_a_raster_too():
    pattern = 128 + 60 * grid(4, 4, height=16, width=24)[..., None]
    assert (raster(pattern.expand(1, 2, -1, -1, 3).byte()) > 0.3).all()


# --- critic


def test_a_critic_learns_what_is_blurred():
    torch.manual_seed(0)
    critic = Critic(8)
    optimizer = torch.optim.AdamW(critic.parameters(), 2e-3, betas=(0.5, 0.9))
    losses = []
    for step in range(30):
        true = noise(4, 3, 3, 32, 32, seed=step)
        scores = critic(torch.cat([true, blurred(true)]))
        assert scores.shape == (8, 1, 2, 2)
        loss = critic_loss(*scores.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_a_critic_is_asked_which_of_two_is_truer():
    """What both pictures show moves both scores, and counts for nothing."""
    true, false = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.0])
    expected = (math.log1p(math.exp(-4)) + math.log(2)) / 2
    assert critic_loss(true, false).item() == pytest.approx(expected)
    assert critic_loss(true + 5, false + 5).item() == pytest.approx(expected, rel=1e-5)
    assert critic_loss(false, true) > critic_loss(true, false)


def test_the_critics_say_has_the_size_that_it_is_given():
    decoded = noise(1, 3, 3, 16, 16).requires_grad_()
    weights = noise(1, 3, 3, 16, 16, seed=1)
    loss, judgement = decoded.square().sum(), (weights * decoded).sum()
    gradient = judged_gradient(loss, judgement, decoded, share=0.3)
    of_judgement = gradient - 2 * decoded.detach()
    torch.testing.assert_close(of_judgement.norm(), 0.3 * 2 * decoded.norm().detach())
    assert F.cosine_similarity(of_judgement.flatten(), weights.flatten(), dim=0) > 0.999


# --- equivariance


def test_latents_and_video_move_together():
    space = 4
    video = noise(2, 3, 5, 24, 32)
    means = F.avg_pool3d(video, (1, space, space))  # stands for latents that a picture's squares decide
    sizes = set()
    for seed in range(12):
        torch.manual_seed(seed)
        z, x = changed(means, video, space)
        assert x.shape[-2:] == (space * z.shape[-2], space * z.shape[-1])
        sizes.add(tuple(z.shape[-2:]))
    assert sizes == {(5, 7), (3, 4)}


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, 1), (3, 3)])
def test_a_shift_is_exact_where_latents_are_linear(down, right):
    space = 4
    ramp = torch.arange(24.0).view(-1, 1) + 2 * torch.arange(32.0)
    video = ramp.expand(1, 3, 1, -1, -1)
    latents = shifted(F.avg_pool3d(video, (1, space, space)), down / space, right / space)
    cut = video[..., down : down + 20, right : right + 28]
    torch.testing.assert_close(latents, F.avg_pool3d(cut, (1, space, space)))


def test_shift_error_tells_linear_latents_from_scrambled_ones():
    space = 4
    coarse = noise(6, 3, 2, 10, 12)
    video = F.interpolate(coarse, (2, 40, 48), mode="trilinear")

    def means(x):
        return F.avg_pool3d(x, (1, space, space))

    smooth = shift_error(means, video, space)
    scrambled = shift_error(lambda x: torch.sin(40 * means(x)), video, space)
    assert smooth < 0.05 < 0.5 < scrambled
