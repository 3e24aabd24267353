"""Train what a recipe says, from where its run stands.

    deepspeed --module dist_fusion.train RECIPE [key=value …]     one node, one rank a GPU
    torchrun -m dist_fusion.train RECIPE [key=value …]            the same
    python -m dist_fusion.train RECIPE [key=value …] --dry-run    check and show, start nothing

Exit codes: 0 done; 75 saved, continue me (start the same command again); 2 the user's mistake; 1 failure.
"""

import json
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from dist_fusion import checkpoint, distributed
from dist_fusion.config import Config, dump, load
from dist_fusion.data.stream import Plan, Stream, load_batches
from dist_fusion.data.text import Tokenizer
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine import build_engine, ds_config, full_weights, start_ranks, stop_ranks
from dist_fusion.evaluate import evaluate
from dist_fusion.models.teachers import TEACHERS
from dist_fusion.models.weights import ModelCard, build_model, initialise_from, save_model
from dist_fusion.monitor import Interval, Monitor, log, start_console
from dist_fusion.preemption import StopRequest
from dist_fusion.schema import UserError
from dist_fusion.tasks import TEACHABLE
from dist_fusion.types import Batch, Output, to_device

DONE, CONTINUE, MISTAKE = 0, 75, 2


def train(config: Config, device: torch.device) -> int:
    """Run the recipe to its end, or until told to stop; returns the exit code. Collective.

    Raises:
        UserError: for whatever is wrong with the recipe, its files or its run, before anything is changed.
    """
    world_size = distributed.world_size()
    tasks = config.active_tasks()
    tokenizer = Tokenizer(config.data.vocabulary, config.model.max_text_length)
    card = model_card(config, tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(card)
    if config.initialise_from:
        fresh = initialise_from(model, card, config.initialise_from, "initialise_from")
        log.info("weights from %s; new heads: %s", config.initialise_from, ", ".join(fresh) or "none")
    teacher = build_teacher(config, card, device)
    plan = Plan(config.micro_batch(world_size), distributed.rank(), world_size, config.seed)
    stream = Stream(config.data, tasks, tokenizer, config.model.image_size, plan)
    held_out = replace(config.data, shards=config.data.dev)
    dev = Stream(held_out, tasks, tokenizer, config.model.image_size, plan, endless=False) if held_out.shards else None
    run = checkpoint.open_run(config, ds_config(config, world_size))
    (run / "logs" / f"rank-{distributed.rank()}.pid").write_text(f"{os.getpid()}\n")

    engine = build_engine(model.to(device), config, world_size)
    seed_everything(config.seed + 1 + distributed.rank())
    step = checkpoint.resume(engine, run, config)
    batches = load_batches(stream.starting_at(step * config.accumulation), config.data.num_workers)
    monitor, stop = Monitor(run, step, config.steps), StopRequest(run / "STOP")
    log.info(
        "%s: step %d of %d, %d samples an epoch, %d ranks", run, step, config.steps, stream.num_samples, world_size
    )
    interval = Interval()

    while step < config.steps:
        # One optimizer step. Half-gathered gradients are in no checkpoint, so nothing is saved inside.
        loaded = interval.fetch(batches, config.accumulation)
        rows = distributed.summed(row_weights([one.batch for one in loaded], tasks).to(device))
        for one in loaded:
            batch = to_device(one.batch, device)
            taught = teach(teacher, batch)
            loss = objective(config.distill, tasks, batch, engine(batch), taught, rows)
            # DeepSpeed averages over ranks and micro-steps; the loss is a share of a sum over both.
            engine.backward(loss.total * (world_size * config.accumulation))
            engine.step()
            interval.add(loss.total, loss.terms)
        step += 1

        stopping = stop.anywhere(device)
        if step % config.log_every == 0 or step == config.steps:
            values = interval.read(config.global_batch)
            values |= {"optimizer/learning_rate": engine.optimizer.param_groups[0]["lr"]}
            values |= {"optimizer/gradient_norm": float(engine.get_global_grad_norm() or 0.0)}
            monitor.scalars(step, values)
            monitor.progress(step, values)
        if dev and config.evaluate_every and (step % config.evaluate_every == 0 or step == config.steps):
            scores = evaluate(engine, tasks, dev, device)
            monitor.scalars(step, {f"dev/{t}/{k}": s.percent for t, kinds in scores.items() for k, s in kinds.items()})
        if stopping or step % config.save_every == 0 or step == config.steps:
            saved = checkpoint.save(engine, run, config, step)
            log.info("saved %s", saved.folder)
        if stopping and step < config.steps:
            log.info("told to stop; start the same command again to continue")
            break

    monitor.close()
    stop.close()
    if step < config.steps:
        return CONTINUE
    if distributed.rank() == 0 and not (run / "model.safetensors").exists():
        newest = checkpoint.list_whole(run)[-1]
        save_model(run, card, full_weights(newest.folder.parent, newest.folder.name))
    distributed.barrier()
    return DONE


def model_card(config: Config, tokenizer: Tokenizer) -> ModelCard:
    """What `config` trains, with a head for each of its tasks."""
    heads = {name: task.head(tokenizer.vocabulary) for name, task in config.active_tasks().items()}
    return ModelCard(config.model, heads, tuple(tokenizer.entries))


def build_teacher(config: Config, card: ModelCard, device: torch.device) -> nn.Module | None:
    """The recipe's frozen teacher, outside of DeepSpeed: never in an optimizer, never in a checkpoint."""
    if config.teacher is None:
        return None
    soft = [task for task in card.heads if task in TEACHABLE] if config.distill.soft else []
    return TEACHERS[config.teacher.kind](config.teacher.folder, card, soft).to(device)


def teach(teacher: nn.Module | None, batch: Batch) -> Output | None:
    """What the teacher says of the batch, without gradient."""
    if teacher is None:
        return None
    with torch.no_grad():
        taught: Output = teacher(batch)
    return taught


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators of this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe(config: Config, world_size: int) -> str:
    """What a run would be: the resolved recipe, DeepSpeed's configuration, parameters and sizes. Raises UserError."""
    tokenizer = Tokenizer(config.data.vocabulary, config.model.max_text_length)
    with torch.device("meta"):
        model = build_model(model_card(config, tokenizer))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    count = "\n".join(f"  {name:<16} {number:>12,}" for name, number in {**parts, "total": sum(parts.values())}.items())
    return (
        f"{dump(config)}\nDeepSpeed, {world_size} ranks:\n{json.dumps(ds_config(config, world_size), indent=2)}\n\n"
        f"Parameters:\n{count}\n\n{config.steps} steps of {config.global_batch} samples, "
        f"{config.micro_batch(world_size)} a rank and micro-step"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: RECIPE [key=value …] [--dry-run]; returns the exit code."""
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    dry = "--dry-run" in given
    words = [a for a in given if a != "--dry-run"]
    try:
        if not words or words[0].startswith("-"):
            raise UserError("which recipe? train RECIPE [key=value …] [--dry-run]; RECIPE is a path or a shipped name")
        config = load(words[0], words[1:])
        if dry:
            sys.stdout.write(describe(config, int(os.environ.get("WORLD_SIZE", "1"))) + "\n")
            return DONE
        device = start_ranks()
        start_console()
        try:
            return train(config, device)
        finally:
            stop_ranks()
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
            sys.stderr.write(f"dist-fusion: {error}\n")
        return MISTAKE


if __name__ == "__main__":
    sys.exit(main())
