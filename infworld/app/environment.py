"""What has to be set before Gradio is imported, which reads it then."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path

from infworld.app.folders import folder_of_this_process, is_of_a_process, own_folder

log = logging.getLogger(__name__)

UPLOADS = "infinite-world-uploads"  # in a folder that others may use as well


def prepare() -> None:
    """Uploads go to a folder of this user's own, and proxies are used where they can be.

    Gradio's statistics, which it makes anew after each event, are of the last events only.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "100")
    os.environ["GRADIO_TEMP_DIR"] = str(uploads_folder())
    mind_proxies()


def uploads_folder() -> Path:
    """A folder for the uploads of this process, below GRADIO_TEMP_DIR where that is set. What processes that were
    killed have left there is removed."""
    given = os.environ.get("GRADIO_TEMP_DIR")
    if not given:
        return folder_of_this_process(own_folder("uploads"))
    folder = Path(given).resolve()
    return folder_of_this_process(folder.parent if is_of_a_process(folder) else folder / UPLOADS)


def mind_proxies() -> None:
    """A system's proxy is not for this machine itself, which Gradio calls at its start; one that cannot be used would
    keep it from starting."""
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost,127.0.0.1,::1"]))
    if importlib.util.find_spec("socksio") is None:
        for name in [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]:
            if os.environ[name].lower().startswith("socks"):
                log.warning("%s is ignored: a SOCKS proxy needs the package socksio (pip install socksio)", name)
                del os.environ[name]
