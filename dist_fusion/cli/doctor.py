"""`dist-fusion doctor`."""

import argparse
import sys

from dist_fusion.doctor import examination

add_arguments = examination.add_arguments


def run(given: argparse.Namespace) -> int:
    """Print what was found; returns 1 if something is red."""
    code, text = examination.examine(given)
    sys.stdout.write(text)
    return code
