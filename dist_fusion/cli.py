"""`dist-fusion …`: the commands for people. `dist-fusion COMMAND --help` says more."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch

import dist_fusion
from dist_fusion import status, train
from dist_fusion.bench.run import BENCHES, DEVICES, bench
from dist_fusion.config import RECIPES, Config, load
from dist_fusion.data.index import outlines
from dist_fusion.data.prepare.plan import Options
from dist_fusion.data.prepare.run import prepare
from dist_fusion.data.prepare.table import listing
from dist_fusion.data.shards import find_shards
from dist_fusion.data.stream import Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.demo.run import SIZES, demo
from dist_fusion.demo.stages import Interrupted
from dist_fusion.doctor import examination as doctor
from dist_fusion.evaluate import evaluate
from dist_fusion.export import export
from dist_fusion.inspect import counts
from dist_fusion.inspect.page import Look, write_page
from dist_fusion.models.weights import require_same_reading, restore_model
from dist_fusion.parts import model_card
from dist_fusion.schema import UserError
from dist_fusion.tasks import to_score

INTERRUPTED = 130
"""What a shell reports of a command that Ctrl-C ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (0 done, 75 saved and to be continued, 2 the user's mistake)."""
    parser = argparse.ArgumentParser(prog="dist-fusion", description=dist_fusion.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    one = commands.add_parser("demo", help="the whole method on real data, on two CPU cores, in minutes")
    one.add_argument("--size", default="full", help=f"one of: {', '.join(SIZES)}")
    one.add_argument("--seeds", type=int, default=1, help="how many seeds to train and average")
    one.add_argument("--fresh", action="store_true", help="start anew beside an earlier demo")

    one = commands.add_parser("train", help="train a recipe on one rank (many: deepspeed --module dist_fusion.train …)")
    one.add_argument("recipe", help="a path, or the name of a shipped recipe")
    one.add_argument("overrides", nargs="*", metavar="key=value")
    one.add_argument("--dry-run", action="store_true", help="check and show, start nothing")
    one.add_argument("--ranks", type=int, default=1, help="with --dry-run: as if on so many ranks")

    one = commands.add_parser("evaluate", help="score a finished run on shards")
    one.add_argument("run", type=Path, help="its folder")
    one.add_argument("--shards", nargs="+", required=True, help="folders of tars")
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    one.add_argument("--device", default=fastest, choices=("cpu", "cuda"), help=f"{fastest} if not given")
    one.add_argument("--task", nargs="+", default=[], help="of the run's tasks; all if not given")

    status.add_arguments(commands.add_parser("status", help="how a run is doing, or all runs of a folder"))
    doctor.add_arguments(commands.add_parser("doctor", help="whether this machine, or all nodes of a job, can train"))
    one = commands.add_parser("export", help="make a model, in fp32, of a run's checkpoint")
    one.add_argument("run", type=Path, help="its folder")
    one.add_argument("--step", type=int, help="of which checkpoint (the newest whole one)")
    one.add_argument("--out", type=Path, metavar="FOLDER", help="where to (RUN/exported/step-…)")
    one.add_argument("--trust", action="store_true", help="also a run of another user: reading it can run code")

    one = commands.add_parser(
        "prepare",
        help="make shards of a data set",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make shards of a data set: DST/train, DST/dev, …. Start it again to continue after a stop.",
        epilog=f"data sets, and what SRC must hold:\n{listing()}",
    )
    one.add_argument("dataset", metavar="NAME", help="one of those below")
    one.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="SRC DST; DST alone for what needs no SRC")
    one.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s)")
    one.add_argument("--preview", type=Path, metavar="FILE", help="then show what was made as a page, as inspect does")
    for option in fields(Options):
        about = f"{option.metadata['about']} ({option.default})" if option.default else option.metadata["about"]
        flag = f"--{option.name.replace('_', '-')}"
        one.add_argument(flag, type=type(option.default), default=option.default, help=about)

    one = commands.add_parser("index", help="make the indices of shards, and count what they hold")
    one.add_argument("shards", nargs="+", help="folders of tars, or tars")

    one = commands.add_parser("inspect", help="show what is in shards as a page: people look before they train")
    one.add_argument("shards", nargs="+", help="folders of tars, or tars")
    one.add_argument("--out", type=Path, default=Path("page.html"), metavar="FILE", help="the page (page.html)")
    one.add_argument("--samples", type=int, default=Look.samples, help=f"how many to show ({Look.samples})")
    one.add_argument("--seed", type=int, default=Look.seed, help=f"which are drawn ({Look.seed})")
    one.add_argument("--size", type=int, default=Look.size, help=f"pixels, as the recipe's ({Look.size})")
    one.add_argument("--vocabulary", default=Look.vocabulary, help=f"as the recipe's ({Look.vocabulary})")

    one = commands.add_parser("bench", help="how fast a part is beside others' of the kind")
    one.add_argument("name", help=f"one of: {', '.join(BENCHES)}")
    one.add_argument("--device", default="cpu", help=f"one of: {', '.join(DEVICES)}")
    one.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    one.add_argument("--quick", action="store_true", help="only see that it runs: tiny, its times say nothing")

    commands.add_parser("recipes", help="list the shipped recipes")

    given = parser.parse_args(arguments)
    try:
        return COMMANDS[given.command](given)
    except KeyboardInterrupt:
        sys.stderr.write("dist-fusion: interrupted; the same command goes on\n")
        return INTERRUPTED
    except UserError as error:
        sys.stderr.write(f"dist-fusion: {error}\n")
        return train.MISTAKE


def _demo(given: argparse.Namespace) -> int:
    try:
        return demo(given.size, given.seeds, given.fresh)
    except Interrupted as error:
        sys.stderr.write(f"dist-fusion: {error}; the same command goes on\n")
        return train.CONTINUE


def _train(given: argparse.Namespace) -> int:
    options = ["--dry-run", f"--ranks={given.ranks}"] if given.dry_run else []
    return train.main([given.recipe, *given.overrides, *options])


def _evaluate(given: argparse.Namespace) -> int:
    """Print the scores and measures and write them to `evaluate.json` in the run's folder."""
    config = _recipe_of(given.run)
    card, model = restore_model(given.run, "the run to evaluate", given.task)
    if given.task:
        left_out = dict.fromkeys(config.active_tasks().keys() - set(given.task))
        config = replace(config, tasks=replace(config.tasks, **left_out))
    data = replace(config.data, shards=tuple(given.shards), sources={})
    tokenizer = Tokenizer(data.vocabulary, card.config.max_text_length)
    require_same_reading(model_card(config, tokenizer), card, given.run, "the run to evaluate")
    tasks = to_score(config.active_tasks())
    plan = Plan(config.micro_batch(1), rank=0, world_size=1, seed=config.seed)
    stream = Stream(data, tasks, tokenizer, card.config.image_size, plan, endless=False)
    device = torch.device(given.device)
    found = evaluate(model.to(device), tasks, stream, device)
    table = {"shards": given.shards, **found.as_json()}
    (given.run / "evaluate.json").write_text(json.dumps(table, indent=2) + "\n")
    sys.stdout.write(found.as_text())
    return train.DONE


def _status(given: argparse.Namespace) -> int:
    sys.stdout.write(status.show(given.run, given.json))
    return train.DONE


def _doctor(given: argparse.Namespace) -> int:
    code, text = doctor.examine(given)
    sys.stdout.write(text)
    return code


def _recipe_of(run: Path) -> Config:
    recipe = run / "config.yaml"
    if not recipe.is_file():
        raise UserError(f"{run} is no run: it has no config.yaml")
    return load(recipe)


def _export(given: argparse.Namespace) -> int:
    """Print the folder of the model that was made."""
    config = _recipe_of(given.run)
    card = model_card(config, Tokenizer(config.data.vocabulary, config.model.max_text_length))
    sys.stdout.write(f"{export(given.run, card, given.step, given.out, given.trust)}\n")
    return train.DONE


def _prepare(given: argparse.Namespace) -> int:
    if given.workers < 1:
        raise UserError(f"--workers is {given.workers}; it must be at least 1")
    options = Options(**{option.name: getattr(given, option.name) for option in fields(Options)})
    sys.stdout.write(prepare(given.dataset.replace("_", "-"), given.folders, options, given.workers))
    if given.preview:
        splits = sorted({str(tar.parent) for tar in given.folders[-1].rglob("*.tar")})
        write_page(splits, given.preview, Look())
        sys.stdout.write(f"{given.preview}\n")
    return train.DONE


def _index(given: argparse.Namespace) -> int:
    """Print how much each folder holds, and every damage by reason with the first of each."""
    sys.stdout.write(counts.as_text(outlines(find_shards(given.shards))))
    return train.DONE


def _inspect(given: argparse.Namespace) -> int:
    look = Look(given.samples, given.seed, given.size, given.vocabulary)
    sys.stdout.write(counts.as_text(write_page(given.shards, given.out, look)))
    sys.stdout.write(f"{given.out}\n")
    return train.DONE


def _bench(given: argparse.Namespace) -> int:
    bench(given.name, given.device, given.json, given.quick)
    return train.DONE


def _recipes(given: argparse.Namespace) -> int:
    """One line a recipe: its name and its first comment."""
    for path in sorted(RECIPES.glob("*.yaml")):
        sys.stdout.write(f"{path.stem:<24} {path.read_text().splitlines()[0].removeprefix('# ')}\n")
    return train.DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "train": _train,
    "evaluate": _evaluate,
    "status": _status,
    "doctor": _doctor,
    "export": _export,
    "prepare": _prepare,
    "index": _index,
    "inspect": _inspect,
    "bench": _bench,
    "recipes": _recipes,
}

if __name__ == "__main__":
    sys.exit(main())
