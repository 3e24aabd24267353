"""`dist-fusion prepare`."""

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from dist_fusion.data.prepare.plan import Options
from dist_fusion.data.prepare.run import prepare
from dist_fusion.data.prepare.table import listing
from dist_fusion.inspect.page import Look, write_page
from dist_fusion.schema import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments: the options of all data sets."""
    parser.description = "Make shards of a data set: DST/train, DST/dev, …. Start it again to continue after a stop."
    parser.epilog = f"data sets, and what SRC must hold:\n{listing()}"
    parser.add_argument("dataset", metavar="NAME", help="one of those below")
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="SRC DST; DST alone for what needs no SRC"
    )
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    parser.add_argument(
        "--preview", type=Path, metavar="FILE", help="then show what was made as a page, as inspect does"
    )
    for option in fields(Options):
        about = f"{option.metadata['about']} ({option.default})" if option.default else option.metadata["about"]
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default, help=about)


def run(given: argparse.Namespace) -> int:
    """Make the shards, and the page of them if it is wanted."""
    if given.workers < 1:
        raise UserError(f"--workers is {given.workers}; it must be at least 1")
    options = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    sys.stdout.write(prepare(given.dataset.replace("_", "-"), given.folders, options, given.workers))
    if given.preview:
        splits = sorted({str(tar.parent) for tar in given.folders[-1].rglob("*.tar")})
        write_page(splits, given.preview, Look())
        sys.stdout.write(f"{given.preview}\n")
    return 0
