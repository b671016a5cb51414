"""A live walk: short chunks whose actions come one by one, with a memory that is kept between them."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from infworld.actions import ActionScript
from infworld.live import LiveWalk
from infworld.progress import Progress
from infworld.world import Chunk, Frames

FORWARD, RIGHT = ActionScript.parse("forward 8"), ActionScript.parse("right 8")


@pytest.fixture
def walk(world, picture):
    return LiveWalk(world, world.start(picture, "back 400", seed=3))


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


def test_the_first_chunk_is_the_worlds_own(walk, world):
    expected = world.next_chunk(walk.session.with_actions(FORWARD), frames=8)
    assert np.array_equal(chunk_of(walk).frames, expected.frames)


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
