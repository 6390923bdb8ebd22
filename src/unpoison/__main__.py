"""`python -m unpoison` is the command `unpoison`."""

from __future__ import annotations

import sys

from unpoison.cli import main

if __name__ == "__main__":
    sys.exit(main())
