"""How well the page plays: the real page in a real Chromium, with keys that are pressed by a script.

    infworld play-benchmark
    infworld play-benchmark --seconds 300 --json play.json

Starts a server of its own unless it is given the address of one. Needs Chromium, and playwright (extra "dev").
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import httpx
import psutil

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
KEYS = ("KeyW", "ArrowRight", "ArrowLeft", "KeyS", "KeyD")
HELD = (1.0, 3.0)  # seconds that a key is held
SETTLED = 5.0  # seconds after the first frame from which on memory is compared
PATIENCE = 120.0  # seconds for the server to start, and for the first frame

MEASURED = """() => {
  let node = document.querySelector("#play canvas");
  while (node && !node.measured) node = node.parentNode ?? node.host;
  return node.measured();
}"""


def measure(address: str, chromium: str, seconds: float, server: int | None) -> dict[str, Any]:
    """Plays the first example for so many seconds. server: the process id of the page's server, if it is here.

    Returns: first_picture (seconds from Play to the first frame), frames, fps, stalls, stalled (share of the time),
    delays (seconds from a key to the first frame made with it: median, p90, worst, number), chunk (frames), rate (the
    frames a second aimed at), and cpu (cores) and memory (bytes, after five seconds and at the end) of the server.
    """
    from playwright.sync_api import sync_playwright

    keys = random.Random(0)
    process = psutil.Process(server) if server else None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(address)
        page.locator("#examples button[data-index='0']").click()
        page.wait_for_selector("#play .still")
        page.click("#play .begin")
        page.wait_for_function(f"({MEASURED})().shown > 0")
        began, used = time.monotonic(), cpu_seconds(process)
        memory = []
        while (elapsed := time.monotonic() - began) < seconds:
            key = keys.choice(KEYS)
            page.keyboard.down(key)
            page.wait_for_timeout(1000 * min(keys.uniform(*HELD), max(0.1, seconds - elapsed)))
            page.keyboard.up(key)
            if process and elapsed > SETTLED:
                memory.append(process.memory_info().rss)
        elapsed = time.monotonic() - began
        found, used = page.evaluate(MEASURED), cpu_seconds(process) - used
        page.click("#play .leave")
        page.wait_for_selector("#play .go-on")
        browser.close()
    delays = sorted(delay / 1000 for delay in found["delays"])
    return {
        "seconds": elapsed,
        "first_picture": found["first"] / 1000,
        "frames": found["shown"],
        "fps": found["shown"] / elapsed,
        "stalls": found["stalls"],
        "stalled": found["stalled"] / 1000 / elapsed,
        "delays": {
            "number": len(delays),
            "median": median(delays),
            "p90": quantiles(delays, n=10)[-1] if len(delays) > 1 else delays[0],
            "worst": delays[-1],
        },
        "chunk": found["chunk"],
        "rate": found["rate"],
        "server_cpu": used / elapsed if process else None,
        "server_memory": [memory[0], memory[-1]] if memory else None,
    }


def cpu_seconds(process: psutil.Process | None) -> float:
    """That a process and its children have used, the ended ones too."""
    if process is None:
        return 0.0
    return sum(process.cpu_times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in process.children(recursive=True))


@contextmanager
def own_server(model: str, device: str) -> Iterator[tuple[str, int]]:
    """A server with this model; its address and process id."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "infworld", "serve", "--model", model, "--device", device, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + PATIENCE
    try:
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise OSError(f"the server did not start: {' '.join(command)}")
            try:
                httpx.get(address, trust_env=False, timeout=5).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield address, process.pid
    finally:
        process.terminate()
        process.wait()


def table(found: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    delays, memory = found["delays"], found["server_memory"]
    rows = [
        ("first picture after Play", f"{found['first_picture']:.2f} s"),
        ("frames shown", f"{found['frames']} in {found['seconds']:.1f} s: {found['fps']:.1f} a second"),
        ("time without a new frame", f"{100 * found['stalled']:.1f} %, {found['stalls']} times"),
        (
            "key to picture",
            f"median {delays['median']:.2f} s, 90 % {delays['p90']:.2f} s, worst {delays['worst']:.2f} s "
            f"({delays['number']} keys)",
        ),
        ("frames in a chunk, frames a second aimed at, at the end", f"{found['chunk']}, {found['rate']:.1f}"),
    ]
    if memory:
        rows.append(("server: cores used", f"{found['server_cpu']:.2f}"))
        rows.append(("server: memory, then and at the end", " and ".join(f"{m / 2**20:.0f} MB" for m in memory)))
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description="Play the page in a real Chromium, and measure how well it goes.")
    parser.add_argument("--seconds", type=float, default=60.0, help="to play (default: %(default)s)")
    parser.add_argument("--model", default="tiny", help="as for infworld serve (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--url", help="of a page that is there already, in place of a server of its own")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there as well")
    args = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        parser.error("there is no Chromium on PATH: install the package chromium")
    if args.url:
        found = measure(args.url, chromium, args.seconds, None)
    else:
        with own_server(args.model, args.device) as (address, process):
            found = measure(address, chromium, args.seconds, process)
    print(table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
