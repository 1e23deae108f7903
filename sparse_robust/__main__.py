"""``python -m sparse_robust`` and ``accelerate launch -m sparse_robust``: the command line."""

import sys

from sparse_robust.cli import main

if __name__ == "__main__":
    sys.exit(main())
