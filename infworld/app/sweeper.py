"""Removes what has expired: films, uploads, what a killed server has left of either, and closed pages."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from gradio.state_holder import StateHolder

from infworld.app.films import Film, FilmStore
from infworld.app.folders import folder_size, make_private, old_files, remove_empty_folders

log = logging.getLogger(__name__)

MOST_PAUSE = 60.0  # seconds between two sweeps


class Sweeper:
    """Sweeps films and the folder of uploads, whoever put something there. `in_use`: the films not to be touched.

    swept: hears, after each sweep, which uploads were removed and how many bytes of them there are.
    """

    def __init__(
        self,
        store: FilmStore,
        uploads: Path,
        uploads_lifetime: float,
        in_use: Callable[[], set[Film]] = set,
        swept: Callable[[set[str], int], None] = lambda removed, size: None,
    ):
        self.store = store
        self.uploads = uploads
        self.uploads_lifetime = uploads_lifetime
        self._in_use = in_use
        self._swept = swept
        self._stopped = threading.Event()

    def sweep(self) -> None:
        """Once. What cannot be removed is logged, and does not keep the rest."""
        for action in (self._sweep_films, self._sweep_uploads):
            try:
                action()
            except OSError as error:  # the disk, or no file descriptors are left
                log.error("sweeping failed: %s", error)
            except Exception:  # whatever it is, the next time it may go
                log.exception("sweeping failed")

    def start(self) -> None:
        """Sweeps from now on in the background, until `stop`."""
        pause = min(MOST_PAUSE, max(0.5, min(self.store.lifetime, self.uploads_lifetime) / 10))

        def work() -> None:
            self.sweep()
            while not self._stopped.wait(pause):
                self.sweep()

        threading.Thread(target=work, name="sweeper", daemon=True).start()

    def stop(self) -> None:
        """Ends the sweeping in the background after the sweep it may be in; returns at once."""
        self._stopped.set()

    def _sweep_films(self) -> None:
        if removed := self.store.sweep(self._in_use()):
            log.info("removed %d films", removed)

    def _sweep_uploads(self) -> None:
        removed = set()
        for path in old_files(self.uploads, self.uploads_lifetime):
            with suppress(FileNotFoundError):
                path.unlink()
            removed.add(str(path))
        if removed:
            log.info("removed %d uploads", len(removed))
            remove_empty_folders(self.uploads)
        make_private(self.uploads)
        self._swept(removed, folder_size(self.uploads))


def forget_closed_pages(pages: StateHolder, seconds: float) -> None:
    """Frees what Gradio keeps of pages that were closed and have done nothing for so long, which it would for good."""
    with pages.lock:
        for session, state in list(pages.session_data.items()):
            if state.is_closed and (datetime.now() - pages.time_last_used[session]).total_seconds() > seconds:
                del pages.session_data[session], pages.time_last_used[session]
