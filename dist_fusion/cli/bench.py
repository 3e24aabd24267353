"""`dist-fusion bench`."""

import argparse
from pathlib import Path

from dist_fusion.bench.run import BENCHES, DEVICES, bench


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("name", help=f"one of: {', '.join(BENCHES)}")
    parser.add_argument("--device", default="cpu", help=f"one of: {', '.join(DEVICES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: tiny, its times say nothing")


def run(given: argparse.Namespace) -> int:
    """Measure, and print."""
    bench(given.name, given.device, given.json, given.quick)
    return 0
