"""`dist-fusion export`."""

import argparse
import sys
from pathlib import Path

from dist_fusion.config import recipe_of
from dist_fusion.data.text import Tokenizer
from dist_fusion.export import export
from dist_fusion.parts import model_card


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--step", type=int, help="of which checkpoint (the newest whole one)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to (RUN/exported/step-…)")
    parser.add_argument("--trust", action="store_true", help="also a run of another user: reading it can run code")


def run(given: argparse.Namespace) -> int:
    """Print the folder of the model that was made."""
    config = recipe_of(given.run)
    card = model_card(config, Tokenizer(config.data.vocabulary, config.model.max_text_length))
    sys.stdout.write(f"{export(given.run, card, given.step, given.out, given.trust)}\n")
    return 0
