"""`dist-fusion …`: the commands for people, a room each. `dist-fusion COMMAND --help` says more.

Only the room of the command that is asked for is loaded: `status` answers at once, and `index` needs no DeepSpeed.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

import dist_fusion
from dist_fusion.schema import UserError

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes: the user's mistake, as for training; what a shell reports of a command that Ctrl-C ended."""
COMMANDS = {
    "demo": "the whole method on real data, on two CPU cores, in minutes",
    "train": "train a recipe on one rank (many: deepspeed --module dist_fusion.train …)",
    "evaluate": "score a finished run on shards",
    "status": "how a run is doing, or all runs of a folder",
    "doctor": "whether this machine, or all nodes of a job, can train",
    "export": "make a model, in fp32, of a run's checkpoint",
    "prepare": "make shards of a data set",
    "index": "make the indices of shards, and count what they hold",
    "inspect": "show what is in shards as a page: people look before they train",
    "bench": "how fast a part is beside others' of the kind",
    "recipes": "list the shipped recipes",
}
"""Each in the room of its name, which has `add_arguments(parser)`, and `run(given)` that returns an exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 75 saved and to be continued, 2 the user's mistake)."""
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    parser = argparse.ArgumentParser(prog="dist-fusion", description=dist_fusion.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rooms = {name: import_module(f"{__name__}.{name}") for name in words[:1] if name in COMMANDS}
    for name, about in COMMANDS.items():
        one = commands.add_parser(
            name, help=about, description=f"{about[0].upper()}{about[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if name in rooms:
            rooms[name].add_arguments(one)
    given = parser.parse_args(words)
    try:
        code: int = rooms[given.command].run(given)
        return code
    except KeyboardInterrupt:
        sys.stderr.write("dist-fusion: interrupted; the same command goes on\n")
        return INTERRUPTED
    except UserError as error:
        sys.stderr.write(f"dist-fusion: {error}\n")
        return MISTAKE
