"""A live walk: short chunks whose actions come one by one, with a memory that is kept between them."""

from __future__ import annotations

import dataclasses
from contextlib import closing

import numpy as np
import pytest
import torch
from conftest import with_sampler

from infworld import live
from infworld.actions import ActionScript
from infworld.live import REFRESH, LiveWalk
from infworld.progress import Progress
from infworld.world import Chunk, Frames

FORWARD, RIGHT = ActionScript.parse("forward 8"), ActionScript.parse("right 8")
HELD, HELD_RIGHT = ActionScript.parse("forward 9"), ActionScript.parse("right 9")  # as a chunk of 8 frames sees them


@pytest.fixture
def walk(world, picture):
    """As of a model that was trained on short chunks."""
    walk = LiveWalk(world, world.start(picture, "back 400", seed=3))
    walk.refresh = REFRESH
    return walk


def chunk_of(walk, actions=FORWARD, frames=8) -> Chunk:
    *_, chunk = walk.iterate_chunk(actions, frames)
    return chunk


def test_frames_come_before_the_chunk_that_they_are_of(walk):
    for index in range(2):
        *before, frames, chunk = walk.iterate_chunk(FORWARD, 8)
        assert isinstance(frames, Frames) and isinstance(chunk, Chunk)
        assert [result.stage for result in before] == ["text", "memory", "sample", "sample", "decode"]
        assert frames.index == chunk.index == index
        assert np.array_equal(frames.frames, chunk.frames)
        assert walk.session is chunk.session


def test_actions_are_those_of_the_new_frames_and_the_past_stays(walk):
    chunk_of(walk, FORWARD)
    chunk_of(walk, RIGHT)
    assert walk.session.settings.actions.text() == "forward 8, right 8"


@pytest.fixture
def compressions(world, monkeypatch):
    """The lengths of the histories that are compressed from now on."""
    lengths, compress = [], world.compress
    monkeypatch.setattr(
        world, "compress", lambda session, *rest: lengths.append(session.history.shape[2]) or compress(session, *rest)
    )
    return lengths


@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 3.0, "negative_prompt": "blur", "preset": "fast", "steps": 3}, {"preset": "balanced"}]
)
def test_the_first_chunk_is_the_worlds_own(world, picture, settings):
    session = world.start(picture, HELD, "a meadow", **settings)
    made, expected = chunk_of(LiveWalk(world, session)), world.next_chunk(session, frames=8)
    torch.testing.assert_close(made.latents, expected.latents, atol=1e-5, rtol=0)


def test_a_walk_of_chunks_of_the_models_own_length_is_the_worlds_film(walk, world):
    for _ in range(2):
        expected = world.next_chunk(walk.session.with_actions("right 8, wait 80"))
        torch.testing.assert_close(chunk_of(walk, RIGHT, 80).latents, expected.latents, atol=1e-5, rtol=0)


def test_the_history_is_compressed_anew_every_few_chunks_only(walk, compressions):
    for _ in range(2 + REFRESH // 8):
        chunk_of(walk, frames=32)
    assert compressions == [1, 1 + REFRESH + 8]


def test_what_is_kept_is_not_computed_again_and_no_key_waits_for_it(walk, world, monkeypatch):
    """After a chunk only its latents are looked at, and then there is nothing left to be done before the next one."""
    chunk_of(walk, frames=16)
    seen, extend = [], live.KeptMemory.extend
    monkeypatch.setattr(
        live.KeptMemory, "extend", lambda memory, latents: seen.append(latents) or extend(memory, latents)
    )
    lengths = [len(seen) for _ in walk.iterate_chunk(FORWARD, 8)]
    assert set(lengths) == {0} and len(seen) == 1
    assert torch.equal(seen[0], walk.session.history[:, :, 5:7])


def test_the_history_is_compressed_anew_between_two_chunks(walk, compressions):
    """Not in one, where a key would wait for it."""
    walk.refresh = 0
    chunk_of(walk)
    before = list(compressions)
    for result in walk.iterate_chunk(FORWARD, 8):
        assert compressions == before, result
    assert before == [1, 3] and compressions == [1, 3, 5]


def test_memory_that_runs_out_between_two_chunks_is_the_next_ones_concern(walk, world, monkeypatch):
    def runs_out(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(world, "compress", runs_out)
    walk.refresh = 0
    walk._kept = live.Kept(live.CompressedHistory(walk.session.history, 1), (), [])
    chunk_of(walk)
    assert walk.session.num_frames == 9


def test_the_encoder_goes_on_from_all_that_it_had(walk, world, monkeypatch):
    """Nothing of it is recomputed, and what it hands on is what a session of the World has."""
    before = chunk_of(walk).session
    calls, encode = [], world.vae.encode
    monkeypatch.setattr(
        world.vae, "encode", lambda video, *rest, **options: calls.append(video) or encode(video, *rest, **options)
    )
    monkeypatch.setattr(world.vae.encoder, "full_rate_features", None)
    after = chunk_of(walk).session
    monkeypatch.undo()
    latents, state = encode(calls[0], before.encoder_state)
    torch.testing.assert_close(after.history[:, :, -2:], latents, atol=1e-5, rtol=1e-5)
    assert after.encoder_state.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(after.encoder_state[name], tensor, atol=1e-4, rtol=1e-4)


def test_live_play_is_not_guided_by_the_memory(world, picture):
    """A film is: a live walk, where time matters more, makes the chunk of a model without that guidance."""
    plain, guided = (with_sampler(world, settled=0.05, memory_guidance=weight) for weight in (0.0, 100.0))
    session = plain.next_chunk(plain.start(picture, HELD, seed=3), frames=8).session.with_actions(HELD)
    film, lively = (guided.next_chunk(session, frames=8).latents, chunk_of(LiveWalk(guided, session)).latents)
    expected = plain.next_chunk(session, frames=8).latents
    assert (film - expected).abs().max() > 1e-2
    torch.testing.assert_close(lively, expected, atol=1e-4, rtol=1e-4)


def test_a_memory_too_large_to_be_kept_is_computed_for_each_chunk(walk, world, monkeypatch):
    monkeypatch.setattr(live, "MAX_KEPT_BYTES", 0)
    first = walk.session
    chunk_of(walk)
    session = walk.session.with_actions(HELD_RIGHT)
    expected = world.next_chunk(session, frames=8, compressed=world.compress(first))
    assert torch.equal(chunk_of(walk, RIGHT).latents, expected.latents)


def test_a_walk_that_runs_out_of_memory_keeps_less(walk, world, monkeypatch):
    """After a chunk that was repeated with a smaller plan, the walk goes on from the compressed history alone."""
    chunk_of(walk)
    assert walk._kept.memories
    monkeypatch.setattr(world, "plan", dataclasses.replace(world.plan, streams="cpu"))
    chunk_of(walk)
    assert not walk._kept.memories


def test_a_walk_may_be_refreshed_less_often_from_any_chunk_on(walk, compressions):
    """There is room for the latents that a longer time brings."""
    walk.refresh = 0
    chunk_of(walk)
    walk.refresh = 50
    for _ in range(3):
        chunk_of(walk, frames=64)
    assert compressions == [1, 3]


def test_models_for_short_chunks_are_refreshed_less_often(world):
    lengths = dataclasses.replace(world.config.validation_data, chunk_lengths=(16, 80))
    trained = dataclasses.replace(world.config, validation_data=lengths)
    assert live.refresh_after(world.config) < live.refresh_after(trained) == REFRESH


def test_another_prompt_holds_from_the_next_chunk_on_without_compressing_anew(walk, world, compressions):
    first = walk.session
    chunk_of(walk)
    walk.session = walk.session.with_prompt("night")
    session = walk.session.with_actions(HELD_RIGHT)
    made = chunk_of(walk, RIGHT)
    assert compressions == [1]
    expected = world.next_chunk(session, frames=8, compressed=world.compress(first))
    torch.testing.assert_close(made.latents, expected.latents, atol=1e-5, rtol=0)


def long_session(world, picture, latents: int):
    """A film of noise with so many latents, 1 + a multiple of 20, of history."""
    session, generator = world.start(picture), torch.Generator().manual_seed(0)
    chunks = (latents - 1) // 20
    added = torch.randn(1, 16, 21 * chunks, *session.history.shape[3:], generator=generator)
    return dataclasses.replace(
        session,
        history=torch.cat([session.history, added[:, :, : latents - 1]], dim=2),
        chunk_latents=tuple(part.half() for part in added.split(21, dim=2)),
        num_frames=1 + 80 * chunks,
    )


@pytest.fixture
def encoded(world, monkeypatch):
    """The lengths of what the compressor encodes from now on: windows, and their results."""
    lengths, encode = [], world.transformer.latent_encoder.encode
    monkeypatch.setattr(
        world.transformer.latent_encoder, "encode", lambda x: lengths.append(x.shape[2]) or encode(x), raising=False
    )
    return lengths


def test_windows_of_a_long_history_are_compressed_ahead(world, picture, compressions, encoded):
    """Between two refreshments a window at a time; the refreshment itself then has fewer left, and is no other."""
    walk = LiveWalk(world, long_session(world, picture, 121))
    walk.refresh, walk.slack = REFRESH, 0
    for _ in range(1 + REFRESH // 8):
        chunk_of(walk, frames=32)
    windows, whole, ahead = [live.WINDOW] * 5, [80], REFRESH // 8
    assert encoded[:-1] == windows + whole + windows[:ahead] + windows[: 5 - 1 - ahead] + whole
    assert encoded[-1:] == windows[:1]  # for the refreshment after that
    assert compressions == [121, 121 + 24]
    latest = dataclasses.replace(walk.session, history=walk.session.history[:, :, : 121 + 24])
    assert torch.equal(walk._kept.compressed.latents, world.compress(latest).latents)


def test_windows_that_have_hardly_moved_are_kept(world, picture, compressions, encoded):
    """But for the last, which has what is new. The first never moves."""
    walk = LiveWalk(world, long_session(world, picture, 121))
    walk.refresh = 0
    for _ in range(4):
        chunk_of(walk, frames=32)
    assert compressions == [121, 129, 137, 145, 153]
    # The third of them begins at 28 of 121 latents and at 44 of 153, the fourth at 42 and 66.
    assert len(encoded) == 6 + 4 * 2 + 2
    exact = world.compress(walk.session)
    assert not torch.equal(walk._kept.compressed.latents, exact.latents)
    assert [walk._windows[place][0] for place in (0, 4)] == [0, 88]


def test_no_window_is_left_to_the_moment_when_windows_are_first_needed(world, picture, compressions, encoded):
    """As the history grows past 80 latents, the four windows that do not have the newest ones are there already."""
    walk = LiveWalk(world, long_session(world, picture, 61))
    walk.refresh = 4
    for frames in (32, 16, 16, 16, 16):
        chunk_of(walk, frames=frames)
    assert compressions == [61, 69, 77, 85]
    window = live.WINDOW  # one after each of the first four chunks; after the last the newest one and the results
    assert encoded == [61, 69, window, window, 77, window, window, window, 80]


def test_models_that_walk_in_whole_chunks_keep_no_window_that_has_moved(world, picture, monkeypatch):
    session = world.start(picture)
    assert LiveWalk(world, session).slack > 0
    lengths = dataclasses.replace(world.config.validation_data, live_lengths=(80,))
    monkeypatch.setattr(world, "config", dataclasses.replace(world.config, validation_data=lengths))
    assert LiveWalk(world, session).slack == 0


def test_the_last_action_is_taken_to_be_held(walk, monkeypatch):
    """A chunk sees the first action after it too, which nobody knows yet."""
    seen = []
    handle = walk.world.transformer.action_encoder.register_forward_pre_hook(
        lambda module, given: seen.append(torch.stack(given)[:, 0].T.tolist())
    )
    chunk_of(walk, FORWARD)
    chunk_of(walk, ActionScript.parse("right 4, left 4"))
    handle.remove()
    assert seen[0] == [[1, 0]] * 9
    assert seen[1] == [[0, 4]] * 4 + [[0, 3]] * 5


def test_a_walk_that_is_broken_off_is_as_it_was(walk):
    before = chunk_of(walk).session
    with closing(walk.iterate_chunk(RIGHT, 8)) as results:
        assert isinstance(next(results), Progress)
    assert walk.session is before
    assert walk.session.settings.actions.text() == "forward 8"
    assert chunk_of(walk, RIGHT).session.num_frames == 17


def test_a_length_that_cannot_be_is_refused_at_once(walk):
    with pytest.raises(ValueError, match="4 to 80 new frames"):
        walk.iterate_chunk(FORWARD, 6)
