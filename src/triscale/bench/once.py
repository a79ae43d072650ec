"""One measurement of memory in a process of its own: `python -m triscale.bench.once JOB` prints it as JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Do the job given as JSON, and print the peak in bytes, or null."""
    job = json.loads(sys.argv[1])
    if job["kind"] == "loss":
        from triscale.bench import loss as kind
    else:
        from triscale.bench import step as kind
    print(json.dumps(kind.peak(job)))


if __name__ == "__main__":
    main()
