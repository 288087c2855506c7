"""`python -m zero_ckpt`: the same as the `zero-ckpt` command."""

import sys

from zero_ckpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
