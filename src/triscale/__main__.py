"""``python -m triscale``, the same as the command ``triscale``."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from triscale.cli import main


def run() -> NoReturn:
    """Run the command of sys.argv and end the process with its exit status."""
    status = main()
    if "WORLD_SIZE" in os.environ:
        # A process of torchrun's. Sharded towers keep the process group, and so gloo's threads, alive; one that lets go
        # of a tensor while Python takes itself down aborts the process (pytorch#179291). So it ends without that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
