"""`dist-fusion inspect`."""

import argparse
import sys
from pathlib import Path

from dist_fusion.inspect import counts
from dist_fusion.inspect.page import Look, write_page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("shards", nargs="+", help="folders of tars, or tars")
    parser.add_argument("--out", type=Path, default=Path("page.html"), metavar="FILE", help="the page (page.html)")
    parser.add_argument("--samples", type=int, default=Look.samples, help=f"how many to show ({Look.samples})")
    parser.add_argument("--seed", type=int, default=Look.seed, help=f"which are drawn ({Look.seed})")
    parser.add_argument("--size", type=int, default=Look.size, help=f"pixels, as the recipe's ({Look.size})")
    parser.add_argument("--vocabulary", default=Look.vocabulary, help=f"as the recipe's ({Look.vocabulary})")


def run(given: argparse.Namespace) -> int:
    """Write the page; print what the shards hold, and where the page is."""
    look = Look(given.samples, given.seed, given.size, given.vocabulary)
    sys.stdout.write(counts.as_text(write_page(given.shards, given.out, look)))
    sys.stdout.write(f"{given.out}\n")
    return 0
