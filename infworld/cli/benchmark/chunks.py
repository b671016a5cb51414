"""The benchmark's chunks and films: measured whole, or summed from their measured parts."""

from __future__ import annotations

from infworld.cli.benchmark.harness import Benchmark, film_histories, guidance_of, relative_error
from infworld.cli.benchmark.record import total
from infworld.config import FRAMES_PER_LATENT
from infworld.memory import MAX_SINGLE_PASS, memory_latents
from infworld.presets import EXACT, PRESETS


def whole_chunk(bench: Benchmark) -> None:
    """One chunk as a user gets it, from session to session, after the longest history."""
    record, name = bench.record, "exact: chunk, longest history"
    guess = chunk_seconds(bench, "exact", bench.histories[0])
    if not record.allows(name, guess):
        return
    session = bench.session(bench.histories[0])
    with bench.peak_memory("exact: peak memory of a chunk"):
        taken, chunk = bench.made(session)
    record.put(name, taken, "s", f"measured once; {guess:.4g} by the sum of its parts")
    bench.exact_latents = chunk.latents


def chunk_seconds(bench: Benchmark, way: str, history: int, steps: float | None = None) -> float | None:
    """A chunk of so many steps (default: the model's own) by its measured parts; None if one is missing."""
    record = bench.record
    alike = [h for h in bench.histories if memory_latents(h) == memory_latents(history)]
    step = next(filter(None, (record[f"{way}: step, history {h}"] for h in alike)), None)
    decode, encode = record[f"{way}: decode a chunk"], record[f"{way}: encode a chunk"]
    if way == "exact":
        prepare = next(filter(None, (record[f"exact: prepare, history {h}"] for h in alike)), None)
        once = total([prepare, decode, encode])
    else:  # the whole history again, in proportion to its frames
        frames = 1 + (history - 1) * FRAMES_PER_LATENT
        once = total([decode, encode and encode * frames / (bench.config.chunk_frames + 1)])
    return total([once, step and step * (steps or bench.steps)])


def film_sum(bench: Benchmark) -> None:
    """The whole film, chunk by chunk from the parts measured above."""
    for way in ("naive", "exact"):
        chunks = [chunk_seconds(bench, way, h) for h in film_histories(bench.config, bench.chunks)]
        name, film = f"{way}: film", total(chunks)
        if film is None:
            bench.record.leave_out(name, "a figure that it rests on is not there")
        else:
            bench.record.put(name, film, "s", f"summed over {len(chunks)} chunks from their measured parts")


def faster_presets(bench: Benchmark) -> None:
    """A film by each of the presets that deviate: summed as above, and a chunk of it measured."""
    longest, sampler = bench.histories[0], bench.config.val_scheduler_cfg
    branches = 1 if guidance_of(bench) == 1 else 2
    for preset in PRESETS.values():
        if preset is EXACT:
            continue
        steps = preset.sampler_steps(sampler)
        passes = preset.passes(sampler, steps, guidance_of(bench)) / branches
        chunks = [chunk_seconds(bench, "exact", h, passes) for h in film_histories(bench.config, bench.chunks)]
        name, guess = f"{preset.name}: chunk, longest history", chunk_seconds(bench, "exact", longest, passes)
        if not bench.record.allows(name, guess):
            continue
        session = bench.session(longest).replace_settings(preset=preset.name, steps=steps)
        taken, chunk = bench.made(session)
        note = f"{steps} steps that cost as much as {passes:g} of exact; measured once; {guess:.4g} by its parts"
        bench.record.put(name, taken, "s", note)
        if bench.exact_latents is not None:
            error = relative_error(chunk.latents, bench.exact_latents)
            note = "of the chunk's latents, random weights: no measure of quality"
            bench.record.put(f"{preset.name}: deviation from exact", error, "", note)
        if (film := total(chunks)) is not None:
            note = f"summed over {len(chunks)} chunks from the parts of exact"
            bench.record.put(f"{preset.name}: film", film, "s", note)


def film_measured(bench: Benchmark) -> None:
    """The film itself, as far as time allows; chunks of the longest memory cost the same and may be counted by one."""
    session, done = bench.session(1), 0
    taken: list[float] = []
    chunks = film_histories(bench.config, bench.chunks)
    for history in chunks:
        if taken and taken[-1] * 1.2 > bench.record.left:
            break
        seconds, chunk = bench.made(session)
        taken.append(seconds)
        session, done = chunk.session, done + 1
        bench.record.put(f"exact: chunk {done} of the film", taken[-1], "s", f"history {history}, measured")
    if done < len(chunks) and chunks[done - 1] <= MAX_SINGLE_PASS:
        return bench.record.leave_out("exact: film, measured", f"only {done} chunks in the time that was left")
    note = f"{done} of {len(chunks)} chunks measured, the others taken to be like the last of them"
    bench.record.put("exact: film, measured", sum(taken) + taken[-1] * (len(chunks) - done), "s", note)
