"""`dist-fusion train`."""

import argparse

from dist_fusion import train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("recipe", help="a path, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dry-run", action="store_true", help="check and show, start nothing")
    parser.add_argument("--ranks", type=int, default=1, help="with --dry-run: as if on so many ranks")


def run(given: argparse.Namespace) -> int:
    """Train on one rank, or show what would be trained; returns the exit code."""
    options = ["--dry-run", f"--ranks={given.ranks}"] if given.dry_run else []
    return train.main([given.recipe, *given.overrides, *options])
