"""Chunks of fewer frames than the model's own, as live play needs them: any length, mixed in one film."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infworld.config import RolloutConfig
from infworld.session import Session

ACTIONS = "forward 40, right 60"


def film(world, picture, lengths, **options):
    session, chunks = world.start(picture, ACTIONS, seed=3), []
    for frames in lengths:
        chunks.append(world.next_chunk(session, frames=frames, **options))
        session = chunks[-1].session
    return chunks


@pytest.fixture(scope="module")
def mixed(world, picture):
    return film(world, picture, (4, 16, 80, 40))


def test_each_chunk_has_its_own_length(mixed):
    assert [len(chunk.frames) for chunk in mixed] == [1 + 4, 16, 80, 40]  # the first begins with the picture
    assert [chunk.latents.shape[2] for chunk in mixed] == [2, 5, 21, 11]
    session = mixed[-1].session
    assert session.num_frames == 1 + 4 + 16 + 80 + 40
    assert session.history.shape[2] == 1 + (session.num_frames - 1) // 4


def test_the_models_own_length_is_the_default(world, picture):
    (asked,) = film(world, picture, (80,))
    (default,) = world.extend(world.start(picture, ACTIONS, seed=3), 1)
    assert np.array_equal(asked.frames, default.frames)


def test_a_film_of_short_chunks_is_saved_resumed_and_shown_again(world, picture, mixed, tmp_path):
    mixed[1].session.save(tmp_path / "film.safetensors")
    resumed = Session.load(tmp_path / "film.safetensors")
    assert np.array_equal(world.next_chunk(resumed, frames=80).frames, mixed[2].frames)
    shown = list(world.replay(mixed[-1].session))
    assert [len(chunk.frames) for chunk in shown] == [5, 16, 80, 40]
    difference = np.concatenate([c.frames for c in shown]).astype(int) - np.concatenate([c.frames for c in mixed])
    assert np.abs(difference).max() <= 2  # the stored latents are float16


def test_actions_go_on_from_chunk_to_chunk(world, picture):
    """What is done in a frame belongs to that frame, however the film is cut into chunks."""
    seen = []
    encoder = world.transformer.action_encoder
    handle = encoder.register_forward_hook(
        lambda module, given, result: seen.append(torch.stack(given)[:, 0].T.tolist())
    )
    try:
        chunks = film(world, picture, (16, 24, 8))
    finally:
        handle.remove()
    pairs = chunks[-1].session.settings.actions.pairs(0, 49)
    expected = [pairs[0:17], pairs[16:41], pairs[40:49]]
    assert [[tuple(pair) for pair in chunk] for chunk in seen] == expected


def test_a_rollout_of_short_chunks(world, picture):
    chunks = list(world.rollout(picture, ACTIONS, num_frames=33, chunk_frames=16))
    assert [len(chunk.frames) for chunk in chunks] == [17, 16]
    with pytest.raises(ValueError, match="ask for 33 or 49 frames, not 41"):
        world.rollout(picture, ACTIONS, num_frames=41, chunk_frames=16)


@pytest.mark.parametrize("frames", [0, -4, 3, 18, 84, 16.0, "16", True])
def test_a_length_that_cannot_be_is_refused(world, picture, frames):
    with pytest.raises(ValueError, match="4 to 80 new frames, in steps of 4"):
        world.next_chunk(world.start(picture), frames=frames)


def test_the_longest_film_has_as_many_frames_whatever_its_chunks(world):
    config = world.config
    assert config.max_frames == 1 + 80 * RolloutConfig().max_chunks
    assert config.chunks_for(config.max_frames, 16) == 5 * RolloutConfig().max_chunks
    with pytest.raises(ValueError, match="at most"):
        config.chunks_for(config.max_frames + 16, 16)


def test_progress_counts_the_frames_of_short_chunks(world, picture):
    heard = []
    session = world.start(picture, ACTIONS)
    list(world.extend(session, 2, heard.append, frames=16))
    assert {(progress.chunk, progress.frames, progress.total_frames) for progress in heard} == {(1, 1, 33), (2, 17, 33)}


# --------------------------------------------------------------------------------------------- a memory that is kept


def test_a_fresh_compressed_history_changes_nothing(world, mixed):
    session = mixed[1].session
    kept = world.next_chunk(session, frames=16, compressed=world.compress(session))
    assert np.array_equal(kept.frames, world.next_chunk(session, frames=16).frames)


def test_latents_since_the_last_compression_follow_as_they_are(world, mixed):
    """The memory that the transformer reads: compressed up to then, everything after it untouched."""
    old, new = mixed[0].session, mixed[2].session
    compressed, read = world.compress(old), []
    encode = world.transformer.encode_memory
    world.transformer.encode_memory = lambda memory, *rest: read.append(memory) or encode(memory, *rest)
    try:
        world.next_chunk(new, frames=4, compressed=compressed)
    finally:
        del world.transformer.encode_memory
    expected = torch.cat([compressed.latents, new.history[:, :, old.history.shape[2] - 1 :]], dim=2)
    assert torch.equal(read[0], expected)
