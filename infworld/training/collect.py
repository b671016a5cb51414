"""Collects free pictures from Debian packages into one pack that training reads (`pictures`).

    python -m infworld.training.collect --packages packages --out pack.zip

Needs `apt-get` and `dpkg`, and some 10 GB in the folder of packages. What is there already is not fetched again.

The pack is a zip of WebP pictures in three folders: `photos`, at most 768 pixels a side; `textures`, 256x256, made to
be repeated; `skies`, panoramas of 1024x256: all azimuths from left to right, elevations of 45 degrees to -45. Its file
`sources.tsv` says of each package how many pictures it gave and under which licences it stands in Debian.

Pictures of plasma-workspace-wallpapers and mate-backgrounds are never training data: they are kept for measuring, and
go into a pack of their own (`--measuring`).
"""

from __future__ import annotations

import argparse
import io
import itertools
import re
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PHOTO_SIDE, TEXTURE_SIDE, SKY_SIZE = 768, 256, (1024, 256)
QUALITY = {"photos": 82, "textures": 78, "skies": 82}
# Names of textures that are no pictures: normals, gloss, masks, light, parts of interfaces.
NOT_COLOURS = re.compile(
    r"(_|-)(n|s|z|g|d|nm|sp|spec|norm|normal|gloss|glow|bump|luma|mask|alpha|parallax|height|reflect|pants|shirt|blend)"
    r"\d*\.|editor|icon|font|logo|particle|caustic|preview|glass|colormap|lightmap",
    re.IGNORECASE,
)
SIDES = (("ft", "rt", "bk", "lf"), ("front", "right", "back", "left"))


@dataclass(frozen=True)
class Source:
    """Pictures of one kind in one package: whose path matches `pattern`, at most `most` of them, evenly spaced."""

    package: str
    kind: str
    pattern: str
    most: int
    licences: str


BY_SA, MANY = "CC-BY-SA-3.0", "CC-BY-SA-3.0, CC-BY-SA-4.0, CC-BY-3.0, CC0-1.0 and others"
SOURCES = (
    Source("endless-sky-data", "photos", "/images/land/", 280, "CC-BY-SA-4.0, CC-BY-SA-3.0, CC-BY-4.0, public domain"),
    Source("lomiri-wallpapers-16.04", "photos", r"\.jpg", 20, "CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0, CC0-1.0"),
    Source("lomiri-wallpapers-20.04", "photos", r"\.jpg", 8, "CC-BY-SA-4.0"),
    Source("ukui-wallpapers", "photos", "2004default|calla|firstgen|goldfish|rhythm|string|the-mouse", 8, BY_SA),
    Source("gnome-backgrounds", "photos", r"-l\.webp", 6, BY_SA),
    Source("python3-skimage", "photos", r"astronaut|coffee|chelsea|rocket\.jpg", 4, "CC0-1.0, public domain"),
    Source("python3-sklearn", "photos", r"china\.jpg|flower\.jpg", 2, "CC-BY-2.0"),
    Source("redeclipse-data", "photos", r"/data/maps/[^/]*\.(png|jpg)", 40, MANY),
    Source("supertuxkart-data", "photos", r"/tracks/[^/]*/[^/]*screenshot[^/]*\.jpg", 30, MANY),
    Source("wesnoth-1.16-data", "photos", "/images/story/", 20, "GPL-2+"),
    Source("python3-skimage", "textures", r"/data/(brick|grass|gravel)\.png", 3, "CC0-1.0"),
    Source("0ad-data", "textures", "textures/terrain/types/", 170, BY_SA),
    Source("nexuiz-textures", "textures", "wall|floor|terrain|trak|metal|egypt|base|desert|dsi|e7|e8", 260, "GPL-2+"),
    Source("redeclipse-data", "textures", "/data/(wicked|unnamed|trak|philipk|jojo|torley|freez|mayhem)", 200, MANY),
    Source("supertuxkart-data", "textures", "/data/textures/", 170, MANY),
    Source("trigger-rally-data", "textures", r"(maps|textures|events)/.*\.jpg", 60, "GPL-2+, CC0-1.0, CC-BY-SA-3.0"),
    Source("extremetuxracer-data", "textures", "/terrains/", 30, "GPL-2+"),
    Source("torcs-data", "textures", "/tracks/.*(grass|sand|wall|road|brick|build|rock|house|tr-)", 80, "GPL-2+, FAL"),
    Source("krita-data", "textures", "/krita/patterns/", 20, "GPL-2+, CC0-1.0"),
    Source("redeclipse-data", "skies", "/(skyboxes|elyvisions)/", 30, MANY),
    Source("0ad-data", "skies", "textures/skies/", 30, BY_SA),
)
# Photographs of landscapes, plants and things, as visitors have them.
MEASURING = (
    Source("mate-backgrounds", "photos", r"/nature/", 12, "GPL-2+, CC-BY-SA-4.0"),
    Source(
        "plasma-workspace-wallpapers",
        "photos",
        "/(Autumn|BytheWater|ColorfulCups|EveningGlow|FallenLeaf|Grey|OneStandsOut|Kokkini)/contents/images/1600x1200",
        12,
        "GPL-2+",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", required=True, type=Path, help="where packages are unpacked, a folder for each")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--measuring", action="store_true", help="collect what is kept for measuring instead")
    args = parser.parse_args()
    table = []
    with zipfile.ZipFile(args.out, "w", zipfile.ZIP_STORED) as pack:
        for source in MEASURING if args.measuring else SOURCES:
            count = 0
            for count, picture in enumerate(collect(source, unpacked(source.package, args.packages)), 1):
                data = io.BytesIO()
                picture.save(data, "webp", quality=QUALITY[source.kind], method=4)
                pack.writestr(f"{source.kind}/{source.package}-{count:03}.webp", data.getvalue())
            table.append(f"{source.package}\t{source.kind}\t{count}\t{source.licences}")
            print(table[-1], f"{args.out.stat().st_size / 1e6:.1f} MB", flush=True)
        pack.writestr("sources.tsv", "\n".join(["package\tkind\tpictures\tlicences", *table]) + "\n")


def unpacked(package: str, packages: Path) -> Path:
    """The folder of a package below `packages`; fetched and unpacked if it is not there."""
    folder = packages / package
    if not folder.is_dir():
        folder.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=packages, check=True)
        (archive,) = packages.glob(f"{package}_*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        archive.unlink()
    return folder


def collect(source: Source, folder: Path) -> Iterator[Image.Image]:
    """The pictures of a source, ready for the pack. What is too small, one-coloured or transparent is left out."""
    names = {name: read for name, read in files(folder) if re.search(source.pattern, name)}
    if source.kind == "skies":
        found = skies(names)
    else:
        kept = sorted(name for name in names if source.kind == "photos" or not NOT_COLOURS.search(name))
        picked = kept[:: max(1, len(kept) // (2 * source.most))]  # as some will be left out
        found = (names[name] for name in picked)
        found = map(photo if source.kind == "photos" else texture, found)
    yield from itertools.islice((picture for picture in found if picture is not None), source.most)


def files(folder: Path) -> Iterator[tuple[str, Path | tuple[Path, str]]]:
    """Pictures below a folder and in the archives there: a path to match, and where to read it."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".zip", ".pk3"):
            with zipfile.ZipFile(path) as archive:
                inside = archive.namelist()
            yield from ((f"{path}/{name}", (path, name)) for name in inside if is_picture(name))
        elif path.is_file() and is_picture(path.name):
            yield str(path), path


def is_picture(name: str) -> bool:
    return name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".dds", ".tga"))


def read(place: Path | tuple[Path, str]) -> Image.Image | None:
    """An opaque RGB picture, or None if much of it is transparent, or it can't be read."""
    try:
        if isinstance(place, Path):
            picture = Image.open(place)
        else:
            with zipfile.ZipFile(place[0]) as archive:
                picture = Image.open(io.BytesIO(archive.read(place[1])))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            if np.asarray(picture.getchannel("A").resize((64, 64))).mean() < 250:
                return None
        return picture.convert("RGB")
    except (OSError, ValueError, NotImplementedError, SyntaxError):
        return None


def photo(place: Path | tuple[Path, str]) -> Image.Image | None:
    picture = read(place)
    if picture is None or min(picture.size) < 300 or dull(picture):
        return None
    picture.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
    return picture


def texture(place: Path | tuple[Path, str]) -> Image.Image | None:
    picture = read(place)
    if picture is None or min(picture.size) < 128 or max(picture.size) > 2 * min(picture.size) or dull(picture):
        return None
    return picture.resize((TEXTURE_SIDE, TEXTURE_SIDE), Image.Resampling.LANCZOS)


def dull(picture: Image.Image) -> bool:
    """Whether a picture is of nearly one colour or nearly black, or a map of normals."""
    small = np.asarray(picture.resize((64, 64)), np.float32) / 255
    red, green, blue = small.mean((0, 1))
    normals = blue > 0.75 and abs(red - 0.5) < 0.12 and abs(green - 0.5) < 0.12
    return bool(small.std((0, 1)).mean() < 0.02 or small.mean() < 0.06 or normals)


def skies(names: dict[str, Path | tuple[Path, str]]) -> Iterator[Image.Image | None]:
    """Panoramas of the sky boxes among files: of the four sides of each, in the order in which they fit best."""
    boxes: dict[str, dict[str, Path | tuple[Path, str]]] = {}
    for name, place in sorted(names.items()):
        if match := re.fullmatch(r"(.*[/_])([^/_.]+)\.[^/]*", name):
            boxes.setdefault(match[1], {})[match[2].lower()] = place
    for faces in boxes.values():
        for sides in SIDES:
            if all(side in faces for side in sides):
                pictures = [read(faces[side]) for side in sides]
                if all(pictures) and min(pictures[0].size) >= 128:
                    yield panorama([np.asarray(picture.resize((256, 256))) for picture in pictures])


def panorama(faces: list[np.ndarray]) -> Image.Image | None:
    """One picture of four square faces of a box around the eye, or None if they don't fit together."""

    def seam(order: tuple[int, ...]) -> float:
        pairs = zip(order, (*order[1:], order[0]), strict=True)
        return float(np.mean([np.abs(faces[a][:, -1].astype(float) - faces[b][:, 0]).mean() for a, b in pairs]))

    best = min(((0, *rest) for rest in itertools.permutations((1, 2, 3))), key=seam)
    inside = np.mean([np.abs(np.diff(face.astype(float), axis=1)).mean() for face in faces])
    if seam(best) > 6 + 2 * inside:
        return None
    width, height = SKY_SIZE
    turn = (np.arange(width) + 0.5) / width * 4
    face, tangent = turn.astype(int), np.tan((turn % 1 - 0.5) * np.pi / 2)
    rise = np.tan((0.5 - (np.arange(height) + 0.5) / height) * np.pi / 2)
    up = rise[:, None] * np.hypot(1, tangent)[None]  # on the face's plane, clamped where the ceiling begins
    row = np.clip((1 - up) * 128, 0, 255).astype(int)
    column = np.broadcast_to(np.clip((tangent + 1) * 128, 0, 255).astype(int), row.shape)
    stack = np.stack([faces[i] for i in best])
    sky = Image.fromarray(stack[np.broadcast_to(face, row.shape), row, column])
    return None if dull(sky) else sky


if __name__ == "__main__":
    main()
