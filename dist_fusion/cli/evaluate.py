"""`dist-fusion evaluate`."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dist_fusion.config import recipe_of
from dist_fusion.data.stream import Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.evaluate import evaluate
from dist_fusion.models.weights import require_same_reading, restore_model
from dist_fusion.parts import model_card
from dist_fusion.tasks import to_score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("--shards", nargs="+", required=True, help="folders of tars")
    fastest = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=fastest, choices=("cpu", "cuda"), help=f"{fastest} if not given")
    parser.add_argument("--task", nargs="+", default=[], help="of the run's tasks; all if not given")


def run(given: argparse.Namespace) -> int:
    """Print the scores and measures and write them to `evaluate.json` in the run's folder."""
    config = recipe_of(given.run)
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
    return 0
