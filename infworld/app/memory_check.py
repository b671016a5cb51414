"""Does the film remember? Its returns to a view in pairs, and what of the past the compressor reads. HTML strings."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from infworld.app.films import Film
from infworld.camera import revisits, walk
from infworld.config import FRAMES_PER_LATENT
from infworld.memory import WINDOW, window_starts
from infworld.video import FPS

THUMBNAIL = 360  # pixels wide at most
WORST, BEST = 8.0, 32.0  # dB, the ends of the bar of likeness


def memory_check(film: Film) -> str:
    """Pairs of frames that the walk sees from the same place, with their likeness, and the strip of windows."""
    session = film.session()
    pairs = revisits(walk(session.settings.actions, session.num_frames))
    strip = coverage_strip(session.history.shape[2])
    if not pairs:
        hint = "This walk never comes back to a view that it has left. Look around, or walk and return, and it will."
        return f'<div class="memory"><p>{hint}</p>{strip}</div>'
    frames = film.frames(sorted({frame for pair in pairs for frame in pair}))
    floor = float(np.mean([psnr(frames[first], frames[away]) for first, away, _ in pairs]))
    shown = "".join(_pair(first, again, frames) for first, _, again in pairs)
    words = (
        "By the map these are the same view, left and seen again. The model is not told: what is alike, it remembers. "
        f"Views of this film that have nothing in common are alike by {floor:.1f} dB."
    )
    return f'<div class="memory"><p>{words}</p><div class="pairs">{shown}</div>{strip}</div>'


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Likeness of two frames (uint8) in dB: 8 is unrelated, above 20 the same place, 99 (the most) identical."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return min(99.0, 10 * np.log10(255**2 / max(error, 1e-9)))


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


def _pair(first: int, again: int, frames: dict[int, np.ndarray]) -> str:
    likeness = psnr(frames[first], frames[again])
    share = np.clip((likeness - WORST) / (BEST - WORST), 0, 1)
    pictures = "".join(_picture(frame, frames[frame]) for frame in (first, again))
    bar = f'<div class="likeness"><i style="width:{100 * share:.0f}%"></i></div>'
    return (
        f'<figure class="pair"><div>{pictures}</div>{bar}<figcaption>alike by {likeness:.1f} dB</figcaption></figure>'
    )


def _picture(index: int, frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    words = f"frame {index}, {index / FPS:.1f} s"
    return f'<span><img src="data:image/webp;base64,{data}" alt="{words}"><small>{words}</small></span>'
