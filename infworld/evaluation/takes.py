"""Which films an evaluation makes, and how one is made with its whole memory or with memory cut to the last frame."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from infworld.actions import MOVES, NO_OP, VIEWS, ActionScript, Segment, words
from infworld.evaluation.cases import Case
from infworld.metrics.memory import inverse
from infworld.progress import Progress
from infworld.session import Session
from infworld.settings import FilmSettings
from infworld.world import World

WHOLE, LAST = "whole", "last"  # memory: of all frames, or of the last one alone
DIRECTIONS = range(1, 9)  # indices of moves and of views that go somewhere
COMBINATIONS = ((1, 3), (1, 4), (2, 3), (2, 4), (1, 1), (1, 2))  # going forward or back while turning


@dataclass(frozen=True)
class Take:
    """One film of an evaluation. kind: "walk" (the case's own actions), "mirror" (some of them, then their inverse),
    "action" (one action held) or "still" (nothing done)."""

    kind: str
    case: Case
    actions: ActionScript
    chunks: int
    seed: int
    memory: str = WHOLE

    @property
    def name(self) -> str:
        """Unique within an evaluation, and a file name."""
        action = f"-{words(self.actions.segments[0]).replace('+', '-').replace(' ', '-')}" * (self.kind == "action")
        return f"{self.kind}-{self.case.name}{action}-{self.memory}"


@dataclass(frozen=True)
class Scope:
    """How much is filmed: cases, the longest walk in chunks, pictures that every action is tried on, which actions, and
    chunks of doing nothing."""

    cases: int | None = None
    walk_chunks: int = 13  # 1041 frames
    action_pictures: int = 2
    actions: tuple[tuple[int, int], ...] = (
        *((move, 0) for move in DIRECTIONS),
        *((0, view) for view in DIRECTIONS),
        *COMBINATIONS,
    )
    still_chunks: int = 13
    memories: tuple[str, ...] = (WHOLE, LAST)


FULL = Scope()
QUICK = Scope(
    cases=2,
    walk_chunks=4,
    action_pictures=1,
    actions=tuple((index, 0) for index in range(1, 5)) + tuple((0, index) for index in range(1, 5)),
    still_chunks=3,
)


def plan(cases: tuple[Case, ...], scope: Scope, chunk: int, seed: int) -> list[Take]:
    """All films of an evaluation, in order. chunk: frames per chunk. A case's films share their seed, so that they
    differ in what they are compared for and not in their noise."""
    takes = []
    cases = cases[: scope.cases]
    for index, case in enumerate(cases):
        length = min(scope.walk_chunks, -(-len(case.actions) // chunk))
        there = ActionScript.from_pairs([pair for pair in case.actions.pairs() if pair != NO_OP][:chunk]).cut(chunk)
        for memory in scope.memories:
            walk = Take("walk", case, case.actions.cut(length * chunk), length, seed + index, memory)
            takes.append(walk)
            if set(there.pairs()) != {NO_OP}:
                takes.append(dataclasses.replace(walk, kind="mirror", actions=there + inverse(there), chunks=2))
    for index, case in enumerate(cases[: scope.action_pictures]):
        for move, view in scope.actions:
            held = ActionScript((Segment(move, view, chunk),))
            takes.append(Take("action", case, held, 1, seed + index))
    if scope.still_chunks:
        takes.append(Take("still", cases[0], ActionScript().cut(chunk), scope.still_chunks, seed))
    return takes


def film(world: World, take: Take, choices: dict, heard: Callable[[Progress], None] | None = None) -> np.ndarray:
    """All frames of a take, the picture first: (1 + chunks * chunk, H, W, 3) uint8. choices: preset, steps, guidance,
    as `World.start` takes them."""
    settings = FilmSettings.for_model(world.config, take.actions, take.case.prompt, seed=take.seed, **choices)
    session = world.start(take.case.picture, settings)
    frames = [session.picture]
    for _ in range(take.chunks):
        chunk = world.next_chunk(session, heard)
        frames.append(chunk.frames[-world.config.chunk_frames :])  # the first chunk begins with the picture
        session = chunk.session if take.memory == WHOLE else forget(world, chunk.session, frames[-1][-1])
    return np.concatenate(frames)


def forget(world: World, session: Session, last: np.ndarray) -> Session:
    """The same film as if it had begun with its last frame (H, W, 3): nothing else is remembered. What comes next,
    noise and actions, stays as it was."""
    rest = ActionScript.from_pairs(session.settings.actions.pairs(session.num_frames - 1))
    begun = world.start(last, dataclasses.replace(session.settings, actions=rest))
    return dataclasses.replace(begun, generator_state=session.generator_state)


def describe(take: Take) -> str:
    """What is done in an action take, in words: `forward+left`; names of `MOVES` and `VIEWS` where there are none."""
    segment = take.actions.segments[0]
    return words(segment) if segment.move < 9 and segment.view < 9 else f"{MOVES[segment.move]}, {VIEWS[segment.view]}"
