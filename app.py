"""The page, as a Hugging Face Space and `python app.py` start it; `infworld serve` is the same."""

from infworld.app.server import main

if __name__ == "__main__":
    main()
