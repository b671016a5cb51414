"""Visitors for a long time: does the server's memory stay where it was after five minutes?

python scripts/soak.py films --minutes 60

films: each visitor loads the page, uploads a picture, films a chunk, continues twice, resumes from the session file,
and goes. uploads: each sends pictures of several megabytes, chooses them, and goes. visitors: each only loads the page
and chooses a picture. Prints the memory once a minute, and exits with 1 if in the end it is more than 15 % above that
of the fifth minute. Needs what the tests need. Not part of the tests, as it takes an hour.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from load_test import MEMORY_GROWTH, ROOT, Server, small_model
from PIL import Image

LIFETIME = 120  # seconds of films and uploads
STEADY = 5  # minutes until the memory is what it should stay
SIDES = {"films": [128], "uploads": [1024, 1536, 640], "visitors": [128]}  # pixels of each visitor's pictures


def visit(address: str, kind: str, number: int, folder: Path) -> None:
    from page_client import PageClient

    client = PageClient(address)
    client.http.get(address).raise_for_status()
    with client.http.stream("GET", f"{client.address}heartbeat/{client.session}"):  # as an open page does
        client.wait(client.load())
        for side in SIDES[kind]:
            image = client.upload(noise(folder / "picture.png", side, number))
            client.wait(client.start("picture", "change", picture=image))
        if kind == "films":
            film(client, image, folder / "session.safetensors")
    client.close()


def noise(path: Path, side: int, number: int) -> Path:
    """A picture that no other visitor has, and that cannot be packed: 3 bytes a pixel."""
    pixels = np.random.default_rng(number).integers(0, 256, (side * 3 // 4, side, 3), np.uint8)
    Image.fromarray(pixels).save(path, compress_level=0)
    return path


def film(client, image: dict, session: Path) -> None:
    client.wait(client.start("generate", picture=image, frames=81))
    client.wait(client.start("more", extra=1))
    event = client.start("more", extra=1)
    client.wait(event)
    path = re.search("gradio_api/file=([^ ]*?session.safetensors)", client.said(event))[1]
    session.write_bytes(client.http.get(f"{client.address}file={path}").content)
    client.wait(client.start("resume", "upload", resume=client.upload(session)))


def main() -> int:
    parser = argparse.ArgumentParser(description="Visit for a long time, and see whether the memory grows.")
    parser.add_argument("kind", choices=SIDES, help="what each visitor does")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--model", help="tiny, or the path of a YAML file; default: a small one of random weights")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        with Server(args.model or str(small_model(folder)), folder, LIFETIME) as server:
            began, number, by_minute = time.monotonic(), 0, {}
            while (minutes := (time.monotonic() - began) / 60) < args.minutes:
                visit(server.address, args.kind, number, folder)
                number += 1
                if int(minutes) not in by_minute:
                    by_minute[int(minutes)] = server.memory()
                    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                    print(
                        f"minute {int(minutes)}: {number} visitors, {server.memory() / 2**20:.0f} MB of memory, "
                        f"{files / 2**20:.0f} MB of files",
                        flush=True,
                    )
            steady, end = by_minute.get(STEADY, by_minute[max(by_minute)]), server.memory()
    print(f"{number} visitors; in the end {end / steady - 1:+.1%} of the memory of minute {STEADY}")
    return int(end > steady * (1 + MEMORY_GROWTH))


if __name__ == "__main__":
    sys.exit(main())
