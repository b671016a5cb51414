"""Parts of the page: Gradio components and what fills them. They know `infworld.actions`; only `app.py` uses them."""
