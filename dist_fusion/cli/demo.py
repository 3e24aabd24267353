"""`dist-fusion demo`."""

import argparse
import sys

from dist_fusion import train
from dist_fusion.demo.run import SIZES, demo
from dist_fusion.demo.stages import Interrupted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--size", default="full", help=f"one of: {', '.join(SIZES)}")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to train and average")
    parser.add_argument("--fresh", action="store_true", help="start anew beside an earlier demo")


def run(given: argparse.Namespace) -> int:
    """The whole demo, or what is left of it; returns the exit code."""
    try:
        return demo(given.size, given.seeds, given.fresh)
    except Interrupted as error:
        sys.stderr.write(f"dist-fusion: {error}; the same command goes on\n")
        return train.CONTINUE
