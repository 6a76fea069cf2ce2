"""`python -m rapm` is the command `rapm`."""

import sys

from rapm.cli import main

if __name__ == "__main__":
    sys.exit(main())
