"""`python -m infworld`, the same as the command `infworld`."""

import sys

from infworld.cli import main

sys.exit(main())
