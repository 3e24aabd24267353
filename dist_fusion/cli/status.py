"""`dist-fusion status`. Loads no torch."""

import argparse
import sys

from dist_fusion import status

add_arguments = status.add_arguments


def run(given: argparse.Namespace) -> int:
    """Print it."""
    sys.stdout.write(status.show(given.run, given.json))
    return 0
