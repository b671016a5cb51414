"""The page, of Gradio, and what makes its films. Nothing else of the package imports it."""

import os

from infworld.app.folders import own_folder

# Uploads go to a folder of this user's own. Gradio reads its name when it is imported.
os.environ.setdefault("GRADIO_TEMP_DIR", str(own_folder("uploads")))
