"""``python -m geo``: print what is installed (``info``) or run a benchmark (``bench NAME``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    import geo

    parser = argparse.ArgumentParser(prog="python -m geo", description="torch-geo: versions, backends and benchmarks.")
    parser.add_argument("--version", action="version", version=geo.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("info", help="print versions and, for each native backend, loaded or why not (the default)")
    bench = commands.add_parser("bench", help="run a benchmark: equality first, then interleaved timings")
    bench.add_argument("name", nargs="?", help="the benchmark; left out, the list of them is printed")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark, see `bench NAME --help`")
    args = parser.parse_args(argv)

    if args.command == "bench":
        from geo.bench import main as run

        return run(args.name, args.options)
    geo.info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
