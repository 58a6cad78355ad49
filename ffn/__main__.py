"""Run the command line: `python -m ffn` is the same as `ffn`."""

import sys

from ffn.cli import main

if __name__ == "__main__":
    sys.exit(main())
