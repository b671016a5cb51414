"""The benchmark's record: figures and the seconds that are left, the JSON file, the goals, the Markdown table."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from infworld.config import PROJECT_ROOT

RESERVE = 5.0  # seconds of the budget that nothing is begun in
GIB = 2**30
KERNEL_NAME = 90  # characters of it in the table


class Record:
    """The figures found so far, the file they are kept in, and the seconds that are left."""

    def __init__(self, path: Path, budget: float, about: dict):
        self.path, self.budget = path, budget
        self.began = time.monotonic()
        self.results = {**about, "figures": {}, "left out": {}, "profiles": {}}

    @property
    def left(self) -> float:
        return self.budget - RESERVE - (time.monotonic() - self.began)

    def __getitem__(self, name: str) -> float | None:
        figure = self.results["figures"].get(name)
        return None if figure is None else figure["value"]

    def put(self, name: str, value: float, unit: str, note: str = "", spread: float | None = None) -> None:
        """spread: (largest - smallest) / median of the repeats."""
        self.results["figures"][name] = {"value": value, "unit": unit, "note": note, "spread": spread}
        self._tell(name, f"{number(value)} {unit} {note}")

    def leave_out(self, name: str, why: str) -> None:
        self.results["left out"][name] = why
        self._tell(name, f"left out: {why}")

    def put_profile(self, name: str, seconds: float, kernels: list[tuple[str, float, int]]) -> None:
        """kernels: name, seconds and calls of those that took longest, of `seconds` in all."""
        self.results["profiles"][name] = {"seconds": seconds, "kernels": kernels}
        self._tell(f"profile of {name}", f"{seconds:.3g} s")

    def allows(self, name: str, seconds: float | None) -> bool:
        """Whether something that takes so many seconds (None: unknown, for want of a figure) may begin."""
        if seconds is None:
            self.leave_out(name, "a figure that it rests on is not there")
        elif seconds > self.left:
            need = f"it would take {seconds:.0f} s, and " if seconds else ""
            self.leave_out(name, f"{need}{max(0, self.left):.0f} s are left")
        return seconds is not None and seconds <= self.left

    def write(self) -> None:
        self.results["seconds"] = time.monotonic() - self.began
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        part.replace(self.path)

    def _tell(self, name: str, what: str) -> None:
        self.write()
        print(f"{self.results['seconds']:6.1f} s  {name}: {what}", flush=True)


def machine(device: torch.device) -> dict[str, str]:
    """Card and versions, for the record."""
    found = {"device": f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found = {"device": f"{card.name}, {card.total_memory / GIB:.0f} GiB", "CUDA": str(torch.version.cuda)}
        found["cuDNN"] = str(torch.backends.cudnn.version())
        found["driver"] = said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0")
    versions = {"torch": torch.__version__, "Python": platform.python_version(), "system": platform.system()}
    commit = said_by("git", "-C", str(PROJECT_ROOT), "rev-parse", "--short", "HEAD")
    return {name: value for name, value in {**found, **versions, "commit": commit}.items() if value}


def said_by(*command: str) -> str:
    """What a program prints, or nothing if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def goals(results: dict) -> list[tuple[str, float, float, bool]]:
    """(what, found, goal, reached) of every goal whose figures are there."""
    figures = {name: figure["value"] for name, figure in results["figures"].items()}
    longest = results["settings"]["longest history"]
    step, film = (
        [figures.get(f"{way}: {what}") for way in ("naive", "exact")] for what in (f"step, history {longest}", "film")
    )
    of_four = results["settings"].get("devices") == 4
    found = [
        ("steady step, naive / exact", ratio(*step), 3.0, True),
        ("film, naive / exact", ratio(*film), 3.0, True),
        ("film, naive / fast", ratio(film[0], figures.get("fast: film")), 12.0, True),
        ("peak GPU memory of a chunk, GiB", figures.get("exact: peak memory of a chunk"), 24.0, False),
        ("error of a chunk's latents, bfloat16", figures.get("error of a chunk, bfloat16"), 1e-2, False),
        ("error of a chunk's latents, float32", figures.get("error of a chunk, float32 at small size"), 1e-4, False),
        ("decode a chunk, s", figures.get("exact: decode a chunk"), 1.1, False),
        ("four devices, exact", figures.get("exact: chunk, times as fast as on one") if of_four else None, 3.6, True),
        ("four devices, fast", figures.get("fast: chunk, times as fast as on one") if of_four else None, 3.5, True),
        ("fast film on four devices, s", figures.get("fast: film on 4"), 55.0, False),
    ]
    return [
        (what, value, goal, value >= goal if more else value <= goal)
        for what, value, goal, more in found
        if value is not None
    ]


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def total(parts: Sequence[float | None]) -> float | None:
    """Their sum, or None if one is missing."""
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def table(results: dict) -> str:
    """The results as a page of Markdown: machine and command, goals, figures, profiles."""
    about = [f"{name} {value}" for name, value in results["machine"].items() if name != "device"]
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    lines = [f"# {results['settings']['model']} on {results['machine']['device']}", ""]
    lines += [f"{', '.join(about)}; {results['seconds']:.0f} s in all.", ""]
    lines += [f"    {results['command']}", "", f"Settings: {settings}.", ""]
    if found := goals(results):
        lines += ["| goal | found | must be | reached |", "|---|---|---|---|"]
        for what, value, goal, reached in found:
            lines.append(f"| {what} | {number(value)} | {number(goal)} | {'yes' if reached else '**no**'} |")
        lines.append("")
    lines += ["| figure | value | spread | what |", "|---|---|---|---|"]
    for name, figure in results["figures"].items():
        spread = "" if figure["spread"] is None else f"{100 * figure['spread']:.1f} %"
        lines.append(f"| {name} | {number(figure['value'])} {figure['unit']} | {spread} | {figure['note']} |")
    lines += [f"\nLeft out: {name} ({why})." for name, why in results["left out"].items()]
    for name, profile in results["profiles"].items():
        lines += ["", f"Kernels of: {name}, {profile['seconds']:.3g} s.", "", "| share | seconds | calls | kernel |"]
        lines += ["|---|---|---|---|"]
        for kernel, seconds, calls in profile["kernels"]:
            share = 100 * seconds / profile["seconds"]
            lines.append(f"| {share:.1f} % | {seconds:.4f} | {calls} | `{kernel[:KERNEL_NAME]}` |")
    return "\n".join(lines) + "\n"


def number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
