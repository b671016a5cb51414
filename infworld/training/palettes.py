"""The moods of procedural worlds: colours and the words for them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Palette:
    """One mood: words for the caption, colours as RRGGBB, `walls`/`roofs`/`leaves` as 'name RRGGBB' lists."""

    sky: str
    floor: str
    zenith: str
    horizon: str
    sun: str
    sun_degrees: tuple[float, float]  # elevation range
    light: tuple[float, float]  # strength of sun and of ambient light
    ground: tuple[str, str, str, str]  # two tones, patch, path
    ridges: tuple[str, str]  # far, near
    peak: float  # slope of the mountain ring: 1 peaks, 3 mesas, 9 a city skyline, 0 hills
    walls: tuple[str, ...]
    roofs: tuple[str, ...]
    leaves: tuple[str, ...]
    cloud: str
    haze: float = 22.0  # units
    glow: float = 0.0  # how much windows and bands shine by themselves


PALETTES = (
    Palette(
        sky="sunny day",
        floor="green meadow",
        zenith="2f86e0",
        horizon="c9ebf7",
        sun="fff0c8",
        sun_degrees=(32, 50),
        light=(0.72, 0.60),
        ground=("7cc552", "66b246", "a4d65e", "ead7a0"),
        ridges=("8db9de", "5a9c80"),
        peak=0.0,
        walls=("white f7efdc", "red dd4f45", "yellow f6c445", "blue 4484cc"),
        roofs=("red cf4338", "orange ea8136", "blue 3568b4"),
        leaves=("green 3b9c49", "lime 8dc93c", "dark green 26805a"),
        cloud="ffffff",
    ),
    Palette(
        sky="sunset",
        floor="sandy plain",
        zenith="54488f",
        horizon="ffb06f",
        sun="ffb066",
        sun_degrees=(13, 20),
        light=(0.80, 0.58),
        ground=("f0b876", "dfa066", "d08458", "fbdfa8"),
        ridges=("b5699c", "8a4766"),
        peak=3.0,
        walls=("red cf5638", "cream f8e0b4", "teal 2aa198", "purple 8450a0"),
        roofs=("teal 1f8f8a", "gold f4b22e", "crimson b32f44"),
        leaves=("green 5d9650", "olive a3a548", "dark green 3d7a52"),
        cloud="ffc9a8",
    ),
    Palette(
        sky="snowy dawn",
        floor="snow field",
        zenith="5f97dc",
        horizon="fbd6d6",
        sun="ffe9d0",
        sun_degrees=(18, 28),
        light=(0.58, 0.62),
        ground=("eef3fb", "d6e3f3", "abd4ee", "c3cfe4"),
        ridges=("aec4e6", "7893c6"),
        peak=1.0,
        walls=("red dc4444", "blue 3b70bd", "yellow f3c14c", "white fafaff"),
        roofs=("red c93a45", "navy 2c4a86", "white ffffff"),
        leaves=("dark green 23705c", "teal 3f9c8c", "pale blue a8d8dc"),
        cloud="fff2f2",
    ),
    Palette(
        sky="neon night",
        floor="dark plaza",
        zenith="0b0a2c",
        horizon="5a2c86",
        sun="d5dcff",
        sun_degrees=(24, 40),
        light=(0.40, 0.72),
        ground=("37306e", "2a2458", "43409a", "c2449c"),
        ridges=("3c2470", "231650"),
        peak=9.0,
        walls=("blue 3c55c8", "purple 7a45c4", "pink d2479e", "teal 1f8fa8"),
        roofs=("cyan 37e6f5", "pink ff55c0", "yellow ffdd4a"),
        leaves=("cyan 2fc8d8", "magenta d64ad0", "lime 8cf060"),
        cloud="4a3590",
        haze=26.0,
        glow=0.9,
    ),
    Palette(
        sky="candy sky",
        floor="pink candy land",
        zenith="6cbcff",
        horizon="ffe6f3",
        sun="fff6df",
        sun_degrees=(30, 45),
        light=(0.52, 0.66),
        ground=("fbc3dc", "f5a9cd", "b5f0d8", "fff0c0"),
        ridges=("d5b6f7", "b98fe8"),
        peak=0.0,
        walls=("pink ff6fa8", "mint 6fe0bc", "yellow ffe05a", "lilac a98cf2"),
        roofs=("red f04a6a", "blue 4aa8f0", "lilac 9a78ec"),
        leaves=("mint 4fd0a0", "pink ff8fc0", "orange ffa24d"),
        cloud="fff4fa",
    ),
    Palette(
        sky="autumn day",
        floor="golden field",
        zenith="3a8be0",
        horizon="fff0d6",
        sun="ffe2a8",
        sun_degrees=(24, 38),
        light=(0.76, 0.58),
        ground=("deba66", "c9a252", "e39a44", "f3e2b8"),
        ridges=("b9a3c2", "a8683c"),
        peak=0.0,
        walls=("cream f6e6c6", "brown 96603e", "white faf6ee", "blue 54789e"),
        roofs=("brown 7d4632", "red b83d2e", "blue 3c5878"),
        leaves=("orange ec7828", "red cc3d2c", "gold f5b92e"),
        cloud="fff6e6",
    ),
    Palette(
        sky="bright noon",
        floor="tropical island",
        zenith="1484e4",
        horizon="b9f0f4",
        sun="fff7da",
        sun_degrees=(46, 60),
        light=(0.62, 0.60),
        ground=("f8e5ac", "efd592", "46cfcc", "fff6dc"),
        ridges=("7cc8dc", "2f9c86"),
        peak=0.0,
        walls=("white fdfaf2", "coral ff7458", "turquoise 2cc0c0", "yellow ffce48"),
        roofs=("coral f05a48", "blue 2678c8", "orange f59a3c"),
        leaves=("green 2fae5c", "lime 9ad544", "dark green 178068"),
        cloud="ffffff",
    ),
    Palette(
        sky="misty morning",
        floor="lavender field",
        zenith="8ea6e6",
        horizon="f8e4ea",
        sun="ffe6cc",
        sun_degrees=(20, 32),
        light=(0.60, 0.64),
        ground=("b194e2", "9678cf", "94c686", "ece0f0"),
        ridges=("b8b2e2", "8c86c4"),
        peak=0.0,
        walls=("cream fbeed6", "purple 7d54b0", "rose e8849c", "white fdfbff"),
        roofs=("purple 6a449e", "slate 56659a", "rose d86684"),
        leaves=("green 5fa872", "sage 9cc48c", "teal 3d8c88"),
        cloud="fff4f4",
        haze=17.0,
    ),
    Palette(
        sky="teal dusk",
        floor="violet planet",
        zenith="16497e",
        horizon="9ce6cc",
        sun="fff0c0",
        sun_degrees=(20, 34),
        light=(0.66, 0.62),
        ground=("9468c2", "7f54ae", "dd6f9c", "d9bdf0"),
        ridges=("5fa6b4", "41669c"),
        peak=1.0,
        walls=("white f6f1ea", "orange f58c34", "blue 3d7cc4", "red e0505a"),
        roofs=("yellow ffcf4a", "white fcfaf6", "teal 22a59c"),
        leaves=("coral ff7a5c", "yellow f7c948", "cyan 52d0d6"),
        cloud="dff7ec",
    ),
    Palette(
        sky="moonlit night",
        floor="blue meadow",
        zenith="0c1c48",
        horizon="4478ac",
        sun="dfeaff",
        sun_degrees=(22, 38),
        light=(0.46, 0.70),
        ground=("2f6a70", "26585f", "3f8276", "7f9cb0"),
        ridges=("2f548c", "1a3560"),
        peak=1.0,
        walls=("blue 4668a4", "white b8c6dc", "red a04658", "violet 6a5aa6"),
        roofs=("yellow ffd766", "orange ffb04e", "yellow ffe28c"),
        leaves=("green 2f7c60", "teal 2a6f80", "blue 3c6aa0"),
        cloud="3d6496",
        haze=24.0,
        glow=0.9,
    ),
)


def rgb(colour: str) -> list[float]:
    """'name RRGGBB' or 'RRGGBB' -> linear light, with the gamma of 2 that `render` undoes."""
    code = colour.split()[-1]
    return [(int(code[i : i + 2], 16) / 255) ** 2 for i in (0, 2, 4)]


def palette_tensor(read: Callable[[Palette], object]) -> Tensor:
    """What `read` finds in every palette, (palettes, ...) float32."""
    return torch.tensor([read(palette) for palette in PALETTES], dtype=torch.float32)
