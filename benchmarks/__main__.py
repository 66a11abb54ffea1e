"""Runs all benchmarks in turn, then writes their plots and the tables in docs/benchmarks.md.

    python -m benchmarks [--quick] [NAME ...]

A quick run prints its tables and does not change the documentation or the results of full runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from . import summary
from .summary import NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {', '.join(NAMES)}")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds, for rough figures"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    names = arguments.names or NAMES
    quick = ["--quick"] if arguments.quick else []
    failed = [
        name
        for name in names
        # Each in a separate process, so that none inherits modules or settings from another.
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *quick], check=False
        ).returncode
    ]
    done = [name for name in names if name not in failed]
    summary.write(done, arguments.quick)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
