"""Lets `python -m kvindex_server` do what the console command does."""

import sys

from kvindex_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
