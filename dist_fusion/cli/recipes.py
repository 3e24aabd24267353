"""`dist-fusion recipes`."""

import argparse
import sys

from dist_fusion.config import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(given: argparse.Namespace) -> int:
    """Print one line a recipe: its name and its first comment."""
    for path in sorted(RECIPES.glob("*.yaml")):
        sys.stdout.write(f"{path.stem:<24} {path.read_text().splitlines()[0].removeprefix('# ')}\n")
    return 0
