"""`python -m wmtp_worker` is the `wmtp` command."""

import sys

from wmtp_worker.cli import main

if __name__ == "__main__":
    sys.exit(main())
