"""`infworld upload` under the name that the documentation of the released model's Spaces knows."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infworld.cli.upload import main

if __name__ == "__main__":
    sys.exit(main())
