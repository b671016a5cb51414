"""Measures against films whose answers are known: shifted, still, mirrored, noisy, seamed and fading ones."""

import cv2
import numpy as np
import pytest

from infworld.actions import MOVES, VIEWS, ActionScript
from infworld.metrics.control import control, expected, motion, residual_motion
from infworld.metrics.memory import by_gap, inverse, mirror, revisit_closure
from infworld.metrics.quality import dynamic_degree, motion_smoothness
from infworld.metrics.similarity import best_match, normalised, random_floor, round_trip_ceiling
from infworld.metrics.stability import drift, seams, still_likeness
from infworld.metrics.summary import summarize

HEIGHT, WIDTH, CHUNK = 96, 128, 20


@pytest.fixture(scope="module")
def panorama() -> np.ndarray:
    """A large picture with texture of several sizes, (400, 1200, 3)."""
    random = np.random.default_rng(0)
    layers = [cv2.GaussianBlur(random.normal(size=(400, 1200, 3)), (0, 0), size) * size for size in (2, 5, 12)]
    picture = sum(layers)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    return (255 * picture).astype(np.uint8)


def look(panorama: np.ndarray, x: float, y: float, zoom: float = 1.0) -> np.ndarray:
    """What a camera at (x, y) of the panorama sees, with subpixel accuracy."""
    columns = (np.arange(WIDTH) - WIDTH / 2) / zoom + WIDTH / 2 + x
    rows = (np.arange(HEIGHT) - HEIGHT / 2) / zoom + HEIGHT / 2 + y
    places = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    return cv2.remap(panorama, *places, cv2.INTER_LINEAR)


def film_of(panorama: np.ndarray, xs, ys=None, zooms=None) -> np.ndarray:
    ys = np.full(len(xs), 150.0) if ys is None else ys
    zooms = np.ones(len(xs)) if zooms is None else zooms
    return np.stack([look(panorama, *place) for place in zip(xs, ys, zooms, strict=True)])


def noise(frames: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


# --- similarity


def test_best_match_finds_a_return_that_is_late(panorama):
    film = film_of(panorama, np.arange(20.0))
    assert best_match(film, 10, film[13], reach=4) == 60
    assert best_match(film, 10, film[13], reach=2) < 40


def test_normalised_scale_has_its_ends_at_floor_and_ceiling(panorama):
    film = film_of(panorama, 30.0 * np.arange(20))
    floor = random_floor(film)
    ceiling = round_trip_ceiling(film, lambda frames: np.clip(frames.astype(int) + 5, 0, 255).astype(np.uint8))
    assert ceiling == pytest.approx(20 * np.log10(255 / 5), abs=0.1)
    assert normalised(floor, floor, ceiling) == 0
    assert normalised(ceiling, floor, ceiling) == 1
    still = np.repeat(film[:1], 20, axis=0)
    assert np.isnan(normalised(60, random_floor(still), 60))


# --- memory


def test_inverse_undoes_every_action_in_the_opposite_order():
    script = ActionScript.parse("forward+left 3, strafe left+up 2, wait 1")
    assert inverse(script).text() == "wait 1, strafe right+down 2, back+right 3"
    every = ActionScript.from_pairs((move, move) for move in range(10))
    assert inverse(inverse(every)) == every


def test_mirror_of_a_film_that_returns_exactly_is_perfect(panorama):
    film = film_of(panorama, 3.0 * np.concatenate([np.arange(21), np.arange(20)[::-1]]))
    returns = mirror(film, CHUNK, every=1)
    assert [(found.first, found.again) for found in returns] == [(i, 40 - i) for i in range(20)]
    assert all(found.psnr == found.best == 60 and found.ssim == pytest.approx(1) for found in returns)
    assert returns[0].gap == 2


def test_mirror_of_a_late_film_is_found_by_the_best_match_alone(panorama):
    late = np.concatenate([np.arange(21), [20] * 3, np.arange(20)[::-1]])[:41]
    returns = mirror(film_of(panorama, 5.0 * late), CHUNK, reach=4)
    far = [found for found in returns if found.again - found.first > 20]
    assert np.mean([found.psnr for found in far]) < 30
    assert all(found.best == 60 for found in far)


def test_mirror_of_noise_is_at_the_floor():
    film = noise(41)
    values = [found.psnr for found in mirror(film, CHUNK)]
    assert normalised(np.mean(values), random_floor(film), 40) == pytest.approx(0, abs=0.01)


def test_mirror_of_an_even_number_of_frames_is_an_error():
    with pytest.raises(ValueError, match="odd number of frames"):
        mirror(noise(40), CHUNK)


def test_revisit_closure_finds_the_returns_of_a_walk_and_their_gaps(panorama):
    actions = ActionScript.parse("right 80, wait 80, left 80")  # back at the start after 3 chunks of 80
    degrees = np.concatenate([np.arange(81), np.full(80, 80), np.arange(80)[::-1]])
    film = film_of(panorama, 4.0 * degrees)
    found = revisit_closure(film, actions, 80)
    assert found and all(entry.best == 60 for entry in found)
    assert {1, 2, 3} >= set(by_gap(found)) >= {2, 3}
    forgetful = np.concatenate([film[:161], noise(80)])
    assert all(entry.best < 15 for entry in revisit_closure(forgetful, actions, 80) if entry.again > 161)


def test_a_walk_that_never_returns_has_no_revisits():
    assert revisit_closure(noise(81), ActionScript.parse("forward 80"), 80) == []


# --- control


def test_motion_of_shifted_films_is_the_shift(panorama):
    for speed in (-2.0, 0.7, 2.5):
        seen = motion(film_of(panorama, 200 + speed * np.arange(10)))
        np.testing.assert_allclose(seen.right * WIDTH, speed, atol=0.15)
        assert np.abs(seen.up * WIDTH).max() < 0.1
    rising = motion(film_of(panorama, np.full(10, 200.0), 150 - 1.5 * np.arange(10)))
    np.testing.assert_allclose(rising.up * WIDTH, 1.5, atol=0.15)


def test_motion_of_a_growing_film_is_zoom(panorama):
    seen = motion(film_of(panorama, np.full(10, 200.0), zooms=1.02 ** np.arange(10)))
    np.testing.assert_allclose(seen.zoom, 0.02, atol=0.005)
    assert np.abs(seen.right * WIDTH).max() < 0.15


def test_expected_signs():
    names = {(MOVES[m], VIEWS[v]): expected(m, v) for m in range(10) for v in range(10)}
    assert names["no-op", "no-op"] == {}
    assert names["uncertain", "uncertain"] == {}
    assert names["go forward", "no-op"] == {"zoom": 1}
    assert names["no-op", "turn up and turn left"] == {"right": -1, "up": 1}
    assert names["go left", "turn right"] == {}
    assert names["go back and go right", "turn right"] == {"right": 1, "zoom": -1}


@pytest.mark.parametrize("direction", [1, -1])
def test_control_is_full_when_obeyed_and_none_when_the_film_goes_the_other_way(panorama, direction):
    film = film_of(panorama, 300 + 2.0 * direction * np.arange(40))
    right = control(film, 0, VIEWS.index("turn right"))
    assert right.obeyed == (direction == 1)
    assert right.sign == (direction == 1)
    if direction == 1:
        assert right.steadiness > 0.9


def test_a_jerky_turn_is_less_steady_than_an_even_one(panorama):
    steps = np.where(np.arange(60) % 10 < 3, 5.0, 0.5)
    jerky = control(film_of(panorama, 100 + np.cumsum(steps)), 0, VIEWS.index("turn right"))
    assert jerky.obeyed and jerky.steadiness < 0.6


def test_a_still_film_obeys_nothing_and_has_no_residual_motion(panorama):
    still = film_of(panorama, np.full(40, 200.0))
    assert residual_motion(still) == pytest.approx(0, abs=1e-3)
    assert not control(still, MOVES.index("go forward"), 0).obeyed
    assert control(still, 0, 0) is None
    assert residual_motion(film_of(panorama, 200 + 1.28 * np.arange(10))) == pytest.approx(1, abs=0.1)


# --- stability


def test_drift_of_a_fading_film_and_of_a_steady_one(panorama):
    still = np.repeat(look(panorama, 200, 150)[None], 1 + 5 * CHUNK, axis=0)
    steady = drift(still, CHUNK)
    assert all(np.allclose(values, 1) for name, values in steady.items() if name != "colour shift")
    assert np.allclose(steady["colour shift"], 0)
    assert still_likeness(still) == 60
    fading = np.concatenate([[1], np.repeat(0.9 ** np.arange(5), CHUNK)])[:, None, None, None]
    grey = (128 + (still - 128.0) * fading).round().astype(np.uint8)
    faded = drift(grey, CHUNK)
    np.testing.assert_allclose(faded["contrast"], 0.9 ** np.arange(5), atol=0.02)
    np.testing.assert_allclose(faded["sharpness"], 0.9 ** np.arange(5), atol=0.05)
    tinted = still.astype(int)
    tinted[1 + 4 * CHUNK :, ..., 0] -= 20
    shift = drift(np.clip(tinted, 0, 255).astype(np.uint8), CHUNK)["colour shift"]
    assert shift[4] == pytest.approx(20, abs=1) and shift[3] == 0


def test_seams_are_one_in_an_even_film_and_large_where_planted(panorama):
    places = 2.0 * np.arange(1 + 4 * CHUNK)
    assert seams(film_of(panorama, places), CHUNK) == pytest.approx([1, 1, 1], abs=0.15)
    jumps = places + 25 * (np.arange(len(places)) > 2 * CHUNK)
    planted = seams(film_of(panorama, jumps), CHUNK)
    assert planted[1] > 3 and planted[[0, 2]] == pytest.approx([1, 1], abs=0.15)
    still = np.repeat(look(panorama, 0, 0)[None], 1 + 2 * CHUNK, axis=0)
    assert seams(still, CHUNK) == pytest.approx([1])


def test_a_film_that_is_no_whole_number_of_chunks_is_an_error():
    with pytest.raises(ValueError, match="whole chunks of 20"):
        drift(noise(30), CHUNK)


# --- quality


def test_motion_smoothness_is_near_one_for_even_motion_and_low_for_noise(panorama):
    even = motion_smoothness(film_of(panorama, 2.0 * np.arange(31)))
    assert even > 0.99
    assert motion_smoothness(np.repeat(look(panorama, 0, 0)[None], 9, axis=0)) == pytest.approx(1, abs=1e-3)
    assert motion_smoothness(noise(9)) < 0.8
    jittery = motion_smoothness(film_of(panorama, 2.0 * np.arange(31) + 6 * (np.arange(31) % 2)))
    assert jittery < even - 0.01


def test_dynamic_degree_tells_a_walk_from_a_still_film(panorama):
    moving = dynamic_degree(film_of(panorama, 2.0 * np.arange(61)), fps=30)
    assert moving.dynamic
    assert moving.flow == pytest.approx(100 * 2 * 4 / HEIGHT, rel=0.1)  # every 4th frame, 2 pixels a frame
    still = dynamic_degree(np.repeat(look(panorama, 0, 0)[None], 61, axis=0), fps=30)
    assert not still.dynamic and still.flow == pytest.approx(0, abs=0.05)


# --- intervals


def test_summary_is_a_mean_with_an_interval_over_films():
    values = np.random.default_rng(0).normal(10, 2, 50)
    figure = summarize([*values, float("nan"), None])
    assert figure.films == 50
    assert figure.mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 50**0.5
    assert figure.low == pytest.approx(values.mean() - half, abs=0.15)
    assert figure.high == pytest.approx(values.mean() + half, abs=0.15)
    assert summarize([3.0]).low == 3 and np.isnan(summarize([]).mean)
