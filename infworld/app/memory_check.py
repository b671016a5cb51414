"""Does the film remember? Its returns to a view in pairs, and what of the past the compressor reads. HTML strings."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from infworld.app.films import Film
from infworld.camera import DEFAULT, revisits, walk
from infworld.config import FRAMES_PER_LATENT, CameraConfig
from infworld.measures import psnr, ssim
from infworld.memory import WINDOW, window_starts

THUMBNAIL = 360  # pixels wide at most
GOOD = 22.0  # dB that a well remembered view has: what the small model reaches after a quarter turn and back
WORDS = ((0.75, "the same view"), (0.4, "partly the same"), (-np.inf, "not recognised"))  # from this share of GOOD on


def memory_check(film: Film, camera: CameraConfig = DEFAULT) -> str:
    """Pairs of frames that the walk sees from the same place, with their likeness, and the strip of windows."""
    session = film.session()
    pairs = revisits(walk(session.settings.actions, session.num_frames, camera), camera=camera)
    strip = coverage_strip(session.history.shape[2])
    if not pairs:
        hint = "This walk never comes back to a view that it has left. Look around, or walk and return, and it will."
        return f'<div class="memory"><p>{hint}</p>{strip}</div>'
    frames = film.frames(sorted({frame for pair in pairs for frame in pair}))
    chance = float(np.mean([psnr(frames[first], frames[away]) for first, away, _ in pairs]))
    shown = "".join(_pair(first, again, frames, chance, film.fps) for first, _, again in pairs)
    words = (
        "By the map, both pictures of a pair show the same view, which the camera left in between. The model is not "
        f"told so: where they match, it remembers. A PSNR of {GOOD:.0f} dB or more is good; {chance:.1f} dB is chance, "
        "which is what different views of this film have. SSIM is 1 for equal pictures and near 0 for unrelated ones."
    )
    return f'<div class="memory"><p>{words}</p><div class="pairs">{shown}</div>{strip}</div>'


def verdict(decibels: float, chance: float) -> tuple[float, str]:
    """Where a likeness lies between chance (0) and good (1), and the word for it."""
    if GOOD - chance < 3:
        return 0.0, "cannot be told, since all views of this film look alike"
    share = float(np.clip((decibels - chance) / (GOOD - chance), 0, 1))
    return share, next(word for least, word in WORDS if share >= least)


def covered_frames(latents: int) -> list[tuple[int, int]]:
    """First and last frame of each window that the compressor takes from a history of that many latents; last in the
    list is the last latent, which is kept as it is."""
    starts = window_starts(latents)
    length = WINDOW if len(starts) > 1 else latents
    spans = [(start, min(start + length, latents)) for start in starts] + [(latents - 1, latents)]
    return [(max(0, FRAMES_PER_LATENT * (a - 1) + 1), FRAMES_PER_LATENT * (b - 1)) for a, b in spans]


def coverage_strip(latents: int) -> str:
    """A strip over all frames of the film with the compressor's windows."""
    frames = FRAMES_PER_LATENT * (latents - 1) + 1
    *windows, _ = spans = covered_frames(latents)
    missed = frames - len({frame for first, last in spans for frame in range(first, last + 1)})
    how = "in one piece" if len(windows) == 1 else f"in {len(windows)} overlapping windows"
    words = f"For the next chunk the model reads its memory of the film {how}, and the last frames as they are"
    words += f"; {missed} of {frames} frames are left out." if missed else "."
    bars = "".join(
        f'<i style="left:{100 * first / frames:.2f}%;width:{100 * (last + 1 - first) / frames:.2f}%" '
        f'title="frames {first} to {last}"></i>'
        for first, last in spans
    )
    picture = f'<div role="img" aria-label="{words}">{bars}</div>'
    return f'<figure class="strip">{picture}<figcaption>{words}</figcaption></figure>'


def _pair(first: int, again: int, frames: dict[int, np.ndarray], chance: float, fps: int) -> str:
    decibels, similarity = (float(measure(frames[first], frames[again])) for measure in (psnr, ssim))
    share, word = verdict(decibels, chance)
    pictures = "".join(_picture(frame, frames[frame], fps) for frame in (first, again))
    bar = f'<div class="likeness"><i style="width:{100 * share:.0f}%"></i></div>'
    words = f"<strong>{word.capitalize()}</strong> · PSNR {decibels:.1f} dB, SSIM {similarity:.2f}"
    return f'<figure class="pair"><div>{pictures}</div>{bar}<figcaption>{words}</figcaption></figure>'


def _picture(index: int, frame: np.ndarray, fps: int) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = f"frame {index}, {index / fps:.1f} s"
    return f'<span><img src="data:image/webp;base64,{data}" alt="{words}"><small>{words}</small></span>'
