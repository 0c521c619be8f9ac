"""``python -m orthoserde``."""

import sys

from orthoserde.cli import main

if __name__ == "__main__":
    sys.exit(main())
