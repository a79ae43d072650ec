"""``python -m triscale``, the same as the command ``triscale``."""

from __future__ import annotations

import sys

from triscale.cli import main

if __name__ == "__main__":
    sys.exit(main())
