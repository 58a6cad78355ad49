"""`python -m ffn` is `ffn`."""

import sys

from ffn.cli import main

if __name__ == "__main__":
    sys.exit(main())
