"""Pictures become worlds: what is collected can be read, what is looked up is there, turning before one is exact."""

import io
import math
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from infworld.training import collect
from infworld.training.pictures import SIZES, levels, load_pictures, look_up, make_atlas
from infworld.training.render import render
from infworld.training.scenes import KINDS, FramePool, measured_walks
from infworld.training.stages import cut_stages, framing_stages, make_skins, make_stages, render_stages, stroll
from infworld.training.worlds import FIELD_OF_VIEW, make_worlds, spawn


def picture(seed: int, height: int = 96, width: int = 160) -> Image.Image:
    """Soft random colours, so that neighbouring places can be told apart and nothing is finer than a pixel."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(1, 3, height // 12, width // 12, generator=generator)
    smooth = F.interpolate(colours, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image.fromarray((smooth.movedim(0, -1) * 255).byte().numpy())


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pack") / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for kind, count in (("photos", 3), ("textures", 17), ("skies", 9)):
            for number in range(count):
                data = io.BytesIO()
                picture(number).save(data, "webp", lossless=True)
                archive.writestr(f"{kind}/some-package-{number:03}.webp", data.getvalue())
    return path


@pytest.fixture(scope="module")
def pictures(pack):
    return load_pictures(pack)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean absolute difference of frames, of 255."""
    return (a.float() - b.float()).abs().mean().item()


# --- looking up


def at(atlas, number: int, u, v, lod: float) -> torch.Tensor:
    """(3, places) of one picture, as its own values again."""
    u, v = (torch.as_tensor(x, dtype=torch.float32).reshape(1, -1) for x in (u, v))
    return look_up(atlas.texels, atlas.size, torch.tensor([[number]]), u, v, torch.full_like(u, lod))[0].sqrt()


def test_texels_are_found_where_they_are_and_repeat():
    size = (16, 32)
    atlas = make_atlas([picture(seed, *size) for seed in (0, 1)], size)
    truth = torch.from_numpy(np.array(picture(1, *size))).float() / 255
    for row, column in ((0, 0), (5, 17), (15, 31)):
        u, v = (column + 0.5) / 32, (row + 0.5) / 16
        found = at(atlas, 1, [u, u + 2, u], [v, v, v - 1], lod=0)
        torch.testing.assert_close(found, truth[row, column, :, None].expand(-1, 3), atol=1e-3, rtol=0)


def test_a_coarser_level_is_a_mean():
    size = (32, 32)
    atlas = make_atlas([picture(0, *size), picture(1, *size)], size)
    truth = torch.from_numpy(np.array(picture(1, *size))).float() / 255
    assert levels(size) == 3
    u, v = (8 + 2) / 32, (20 + 2) / 32  # the middle of a square of four texels
    torch.testing.assert_close(at(atlas, 1, [u], [v], 2)[:, 0], truth[20:24, 8:12].mean((0, 1)), atol=5e-3, rtol=0)
    between = (at(atlas, 1, [u], [v], 1) + at(atlas, 1, [u], [v], 2)) / 2
    torch.testing.assert_close(at(atlas, 1, [u], [v], 1.5), between, atol=1e-3, rtol=0)


def test_unseen_textures_are_others(pack):
    seen, kept = load_pictures(pack), load_pictures(pack, unseen=True)
    assert len(seen.photos) == len(kept.photos) == 3
    assert len(seen.textures) + len(kept.textures) == 17 and 2 <= len(kept.textures) <= 3
    assert seen.textures.size == SIZES["textures"]
    each = kept.textures.texels.view(len(kept.textures), -1)
    others = seen.textures.texels.view(len(seen.textures), -1)
    assert not (each[:, None, :64] == others[None, :, :64]).all(-1).any()


def test_a_pack_without_pictures_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("sources.tsv", "")
    with pytest.raises(ValueError, match="no pictures"):
        load_pictures(tmp_path / "empty.zip")


# --- picture worlds


def poses(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    """(1, T, 4)"""
    return torch.tensor(rows)[None]


def warp(frame: torch.Tensor, yaw: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame (H, W, 3) as a camera turned by `yaw` to the right sees it, and where that lies inside of the frame."""
    height, width = frame.shape[:2]
    half = math.tan(FIELD_OF_VIEW / 2)
    right = ((torch.arange(width) + 0.5) / width * 2 - 1) * half
    up = ((torch.arange(height) + 0.5) / height * 2 - 1) * half * height / width
    ahead = math.cos(yaw) - right * math.sin(yaw)
    x = (right * math.cos(yaw) + math.sin(yaw)) / ahead / half
    y = up[:, None] / ahead[None] / (half * height / width)
    grid = torch.stack([x[None].expand_as(y), y], -1)[None]
    seen = F.grid_sample(frame.movedim(-1, 0)[None].float(), grid, align_corners=False)[0].movedim(0, -1)
    return seen, (grid[0].abs() < 0.97).all(-1)


def test_turning_is_a_homography(pictures):
    stages = framing_stages(pictures.photos, torch.tensor([0]))
    first, turned = render_stages(stages, pictures.photos, poses((0, 0, 0, 0), (0, 0, -0.35, 0)), 72, 96)[0]
    expected, inside = warp(first, 0.35)
    assert inside.float().mean() > 0.4
    assert error(turned[inside], expected[inside]) < 1.5
    assert error(turned[inside], first[inside]) > 10


def test_the_first_view_is_the_middle_of_the_photograph(pictures):
    stages = framing_stages(pictures.photos, torch.tensor([1]))
    seen = render_stages(stages, pictures.photos, poses((0, 0, 0, 0)), 96, 128)[0, 0]
    middle = np.array(picture(1).crop((16, 0, 144, 96)))  # 4:3 of 160x96
    assert error(seen, torch.from_numpy(middle)) < 2


def test_it_goes_on_mirrored_beyond_its_edge(pictures):
    stages = framing_stages(pictures.photos, torch.tensor([0]))
    edge = math.atan(stages.half[0, 0].item())
    seen = render_stages(stages, pictures.photos, poses((0, 0, -edge, 0)), 72, 96)[0, 0]
    assert error(seen, seen.flip(1)) < 1.5


@pytest.mark.parametrize("width, height", [(160, 96), (128, 96), (72, 96)])
def test_a_cut_lies_within_its_photograph(width, height):
    """Of a picture whose colours tell the column and row, every first view goes on without turning back at an edge."""
    across, down = torch.linspace(40, 215, width).expand(height, -1), torch.linspace(40, 215, height)[:, None]
    ramps = torch.stack([across, down.expand(-1, width), torch.full_like(across, 128)], -1)
    photos = make_atlas([Image.fromarray(ramps.byte().numpy())], SIZES["photos"])
    generator = torch.Generator().manual_seed(0)
    stages, yaw = cut_stages(photos, torch.zeros(24, dtype=torch.int64), generator)
    begin = F.pad(yaw[:, None], (2, 1))[:, None]
    seen = render_stages(stages, photos, begin, 48, 64)[:, 0].float()
    columns, rows = seen[..., 0].mean(1).diff(dim=1), seen[..., 1].diff(dim=1)
    assert (columns * stages.mirrored[:, None] > -0.5).all()
    assert (rows > -2).all()  # roundings only: folded, they would fall by as much as they rise
    assert {-1.0, 1.0} == set(stages.mirrored.tolist())
    assert (yaw > 0.02).any() and (yaw < -0.02).any() or width / height < 4 / 3
    reach = seen[..., 1].amax((1, 2)) - seen[..., 1].amin((1, 2))
    assert reach.max() > 1.2 * reach.min()  # some see more of it than others


def test_walking_moves_the_ground_more_than_the_backdrop(pictures):
    stages = framing_stages(pictures.photos, torch.tensor([0]))
    first, walked, back = render_stages(
        stages, pictures.photos, poses((0, 0, 0, 0), (0, 0.5, 0, 0), (0, 0, 0, 0)), 72, 96
    )[0]
    assert torch.equal(first, back)
    assert error(first[60:], walked[60:]) > 2 * error(first[:30], walked[:30]) > 1


def test_strolls_stay_on_the_stage_and_follow_their_actions(pictures):
    generator = torch.Generator().manual_seed(0)
    stages = make_stages(pictures.photos, torch.tensor([0, 1]), generator)
    forward, still, right = torch.ones(2, 600).long(), torch.zeros(2, 600).long(), torch.full((2, 600), 4)
    walked = stroll(stages, torch.zeros(2, 4), forward, still)
    assert (walked[..., :2].norm(dim=2) <= 0.4 * stages.radius[:, None] + 1e-5).all()
    torch.testing.assert_close(walked[:, 10, 0], torch.full((2,), 0.4))
    turned = stroll(stages, torch.zeros(2, 4), still, right, torch.tensor([[1.0, 1.0], [1.0, 2.0]]))
    torch.testing.assert_close(turned[:, 80, 2], torch.tensor([-math.pi / 2, -math.pi]))


# --- textured worlds


@pytest.fixture(scope="module")
def worlds():
    return make_worlds(range(3))


@pytest.fixture(scope="module")
def skins(worlds, pictures):
    return make_skins(worlds, pictures, torch.Generator().manual_seed(0))


def bare(skins):
    """Skins without textures, rooms and skies, for the app's camera."""
    bare = skins[torch.arange(len(skins.zoom))]
    bare.zoom = torch.ones_like(bare.zoom)
    for part in (bare.ground, bare.solids, bare.sky):
        part[..., 0] = -1
    bare.room[:, :3] = 1e3
    return bare


def test_bare_skins_change_nothing(worlds, skins, pictures):
    start = spawn(worlds)[:, None]
    plain = render(worlds, start, 24, 32)
    worn = render(worlds, start, 24, 32, skins=bare(skins), pictures=pictures)
    assert (plain.int() - worn.int()).abs().max() <= 1


@pytest.mark.parametrize("part", ["ground", "solids", "sky"])
def test_each_texture_shows(part, worlds, skins, pictures):
    start = spawn(worlds)[:, None]
    some = bare(skins)
    plain = render(worlds, start, 24, 32, skins=some, pictures=pictures)
    getattr(some, part)[..., 0] = 1
    worn = render(worlds, start, 24, 32, skins=some, pictures=pictures)
    changed = (plain.int() - worn.int()).abs().sum(-1) > 8
    assert all(0.02 < world.float().mean() < 0.9 for world in changed)


def test_a_room_hides_the_sky(worlds, skins, pictures):
    start = spawn(worlds)[:, None]
    some = bare(skins)
    some.room[:, :3] = torch.tensor([9.0, 9.0, 3.0])
    frames = []
    for sky in (0, 1):
        some.sky[:, 0] = sky
        frames.append(render(worlds, start, 24, 32, skins=some, pictures=pictures))
    assert (frames[0].int() - frames[1].int()).abs().max() <= 1


def test_zoom_narrows_the_view(worlds, skins, pictures):
    start = spawn(worlds)[:, None]
    some = bare(skins)
    wide = render(worlds, start, 48, 64, skins=some, pictures=pictures)
    some.zoom[:] = 0.5
    near = render(worlds, start, 24, 32, supersample=2, skins=some, pictures=pictures)
    assert error(near, wide[:, :, 12:36, 16:48]) < 3 < error(near, wide[:, :, ::2, ::2])


# --- clips


def test_a_pool_takes_kinds_in_turn(pictures, monkeypatch):
    pool = FramePool(2, (12, 16), 0, torch.device("cpu"), False, pictures)
    made = []
    monkeypatch.setattr(
        pool, "walks", lambda kind, count: made.append(kind) or torch.zeros(count, 81, 12, 16, 3).byte()
    )
    for _ in range(2 * len(KINDS)):
        pool.renew()
    assert made == [*KINDS, *KINDS]


def test_what_is_measured_is_the_same_every_time(pack):
    first, again = (measured_walks(2, (12, 16), torch.device("cpu"), (pack, pack)) for _ in range(2))
    assert first.keys() == {"toy", "textured", "photos"}
    assert all(torch.equal(first[kind], again[kind]) for kind in first)
    assert all(walks.shape == (2, 81, 12, 16, 3) for walks in first.values())
    turned, walked = first["photos"].float()
    assert (turned[1] - turned[0]).abs().mean() > 1.5 * (walked[1] - walked[0]).abs().mean() > 0


# --- collecting


def faces(sky: np.ndarray) -> list[np.ndarray]:
    return [sky[:, 256 * i : 256 * (i + 1)] for i in range(4)]


def test_a_sky_box_is_put_together_in_any_order():
    sky = np.array(picture(3, 252, 1020).resize((1024, 256)))
    sky[:, -12:] = (sky[:, -12:] * np.linspace(1, 0, 12)[:, None] + sky[:, :1] * np.linspace(0, 1, 12)[:, None]).round()
    front, right, back, left = faces(sky)
    a, b = (
        np.asarray(collect.panorama(order), int) for order in ([front, right, back, left], [front, back, left, right])
    )
    assert np.array_equal(a, b)
    columns = np.arange(0, 1024, 128)  # edges and middles of the sides, where a flat one is not distorted
    assert (
        np.abs(a[128, columns] - sky[128, columns]).mean() < 8 < np.abs(a[128, columns] - sky[128, columns - 64]).mean()
    )
    assert collect.panorama([front, right[:, ::-1], back, 255 - left]) is None


def test_only_opaque_pictures_of_some_size_are_taken(tmp_path):
    picture(0, 360, 480).save(tmp_path / "good.png")
    picture(0, 60, 80).save(tmp_path / "small.png")
    Image.new("RGB", (480, 360), "red").save(tmp_path / "plain.png")
    clear = picture(0, 360, 480).convert("RGBA")
    clear.putalpha(100)
    clear.save(tmp_path / "clear.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    source = collect.Source("some", "photos", r"\.png", 10, "CC0-1.0")
    assert [found.size for found in collect.collect(source, tmp_path)] == [(480, 360)]


def test_a_pack_tells_its_sources_and_can_be_read(tmp_path, monkeypatch):
    folder = tmp_path / "packages" / "some" / "usr"
    folder.mkdir(parents=True)
    for number in range(9):
        picture(number, 252, 252).resize((256, 256)).save(folder / f"wall{number}.png")
        picture(number, 252, 252).resize((256, 256)).save(folder / f"wall{number}_norm.png")
    source = collect.Source("some", "textures", "wall", 20, "CC0-1.0")
    monkeypatch.setattr(collect, "SOURCES", (source,))
    monkeypatch.setattr(
        sys, "argv", ["collect", "--packages", str(tmp_path / "packages"), "--out", str(tmp_path / "p.zip")]
    )
    collect.main()
    with zipfile.ZipFile(tmp_path / "p.zip") as archive:
        assert archive.read("sources.tsv").decode().splitlines()[1] == "some\ttextures\t9\tCC0-1.0"
    assert len(load_pictures(tmp_path / "p.zip").textures) == 9 - 1


def test_what_is_kept_for_measuring_is_in_no_training_source():
    kept = {source.package for source in collect.MEASURING}
    assert kept == {"plasma-workspace-wallpapers", "mate-backgrounds"}
    assert not kept & {source.package for source in collect.SOURCES}
