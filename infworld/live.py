"""Live play: a film that goes on in short chunks, whose actions are known only when each begins.

A World films any chunk from its session alone. A LiveWalk keeps what does not change from one short chunk to the next:
the history is compressed anew every few chunks only, and the latents since then follow it uncompressed.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing

from infworld.actions import ActionScript
from infworld.progress import Progress
from infworld.session import Session
from infworld.world import Chunk, CompressedHistory, Frames, World

REFRESH = 20  # latents uncompressed at most: the history is compressed anew before there are more


class LiveWalk:
    """A film that goes on in short chunks. `session` is the film after the last finished chunk.

    Raises ValueError for a session that does not fit the world's model.
    """

    def __init__(self, world: World, session: Session):
        world.check_session(session)
        self.world = world
        self.session = session
        self._compressed: CompressedHistory | None = None

    def iterate_chunk(self, actions: ActionScript, frames: int) -> Generator[Progress | Frames | Chunk]:
        """The next chunk step by step: a Progress after each stage and step, the new Frames as soon as they are
        decoded, and at last the Chunk.

        actions: of the new frames alone; they take the place of all that the session's script had from there on.
        frames: new ones, a multiple of 4 up to 80. Closing the iterator ends the work after the step it is in, and
        leaves `session` as it was. Raises ValueError for a chunk that cannot be, before anything is computed.
        """
        session = self.session.with_actions(actions)
        known = session.history.shape[2]
        if self._compressed is None or known - self._compressed.length + frames // 4 > REFRESH:
            self._compressed = self.world.compress(session)
        return self._made(self.world.iterate(session, 1, frames, compressed=self._compressed))

    def _made(self, results: Generator[Progress | Frames | Chunk]) -> Generator[Progress | Frames | Chunk]:
        with closing(results):
            for result in results:
                if isinstance(result, Chunk):
                    self.session = result.session
                yield result
