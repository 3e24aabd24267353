"""`dist-fusion index`."""

import argparse
import sys

from dist_fusion.data.index import outlines
from dist_fusion.data.shards import find_shards
from dist_fusion.inspect import counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("shards", nargs="+", help="folders of tars, or tars")


def run(given: argparse.Namespace) -> int:
    """Print how much each folder holds, and every damage by reason with the first of each."""
    sys.stdout.write(counts.as_text(outlines(find_shards(given.shards))))
    return 0
