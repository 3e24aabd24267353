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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dist_fusion import checkpoint, distributed
from dist_fusion.config import Config, dump, load
from dist_fusion.data.remote import is_remote
from dist_fusion.data.shards import find_shards
from dist_fusion.data.stream import Plan, Stream, load_batches
from dist_fusion.data.text import Tokenizer
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine.optimizer import base_learning_rate, build_engine, check_multipliers, gradient_norm, skipped
from dist_fusion.engine.ranks import start_ranks, stop_ranks
from dist_fusion.engine.sharding import check_device, ds_config
from dist_fusion.engine.state import full_weights
from dist_fusion.evaluate import evaluate
from dist_fusion.facts import measure, table
from dist_fusion.models.execution import Aside, set_execution
from dist_fusion.models.initial import initialise_from
from dist_fusion.models.sources import source_digest
from dist_fusion.models.teachers import Teacher, build_teacher, teach
from dist_fusion.models.weights import ModelCard, build_model, save_model
from dist_fusion.monitor import Interval, Monitor, log, start_console
from dist_fusion.preemption import StopRequest
from dist_fusion.schema import UserError
from dist_fusion.tasks import Task, to_score
from dist_fusion.tasks.vqa import read_answers
from dist_fusion.types import meaning_of, to_device

DONE, CONTINUE, MISTAKE = 0, 75, 2


class Parts(NamedTuple):
    """What a run is made of, checked and in memory, before anything of it is on disk."""

    tasks: dict[str, Task]
    card: ModelCard
    model: nn.Module
    teachers: tuple[Teacher, ...]
    stream: Stream
    dev: Stream | None
    identity: dict[str, object]  # what must be as it was when the run is continued


def train(config: Config, device: torch.device) -> int:
    """Run the recipe to its end, or until told to stop; returns the exit code. Collective.

    Raises:
        UserError: for whatever is wrong with the recipe, its files or its run, before anything is changed.
    """
    sharding = ds_config(config, distributed.world_size())
    check_device(config, sharding, device)
    parts = prepare(config, device)
    with checkpoint.claim(config, sharding, parts.identity) as run:
        if distributed.from_first((run / "model.safetensors").exists()):
            log.info("%s has ended; its model is there", run)
            return DONE
        stop = StopRequest(run / "STOP")
        (run / "logs" / f"rank-{distributed.rank()}.pid").write_text(f"{os.getpid()}\n")
        try:
            return fit(config, parts, run, stop, device)
        finally:
            stop.close()


def prepare(config: Config, device: torch.device) -> Parts:
    """Models and data as the recipe says. Raises UserError for what is wrong with either."""
    tasks = config.active_tasks()
    tokenizer = Tokenizer(config.data.vocabulary, config.model.max_text_length)
    card = model_card(config, tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(card)
    check_multipliers(model, config.optimizer.multipliers)
    set_execution(model, activation_checkpointing=config.activation_checkpointing, compile=config.compile)
    if config.initialise_from:
        fresh = initialise_from(model, card, config.initialise_from, "initialise_from")
        log.info("weights from %s; new heads: %s", config.initialise_from, ", ".join(fresh) or "none")
    teachers = build_teachers(config, card, device)
    plan = Plan(config.micro_batch(distributed.world_size()), distributed.rank(), distributed.world_size(), config.seed)
    stream = Stream(config.data, tasks, tokenizer, config.model.image_size, plan)
    held_out = replace(config.data, shards=config.data.dev, sources={})
    dev = None
    if config.evaluate_every:
        dev = Stream(held_out, to_score(tasks), tokenizer, config.model.image_size, plan, endless=False)
    identity = {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        "heads": card.heads,
        "vocabulary": sha256("\n".join(card.vocabulary).encode()).hexdigest(),
        "teachers": [source_digest(teacher.source, "teachers") for teacher in config.teachers],
        "samples": stream.num_samples,
    }
    return Parts(tasks, card, model, teachers, stream, dev, identity)


def fit(config: Config, parts: Parts, run: Path, stop: StopRequest, device: torch.device) -> int:
    """The loop, from the newest checkpoint on; returns the exit code. Collective."""
    ranks, tasks = distributed.world_size(), parts.tasks
    engine = build_engine(parts.model.to(device), config, ranks)
    seed_everything(config.seed + 1 + distributed.rank())
    step = checkpoint.resume(engine, run)
    ahead = parts.stream.starting_at(step * config.accumulation)
    batches = load_batches(ahead, config.data.num_workers, pin=device.type == "cuda")
    monitor, interval, aside = Monitor(run, step, config.steps), Interval(), Aside(device, config.teacher_stream)
    monitor.quarantine(parts.stream.damages)
    log.info(
        "%s: step %d of %d, %d samples an epoch, %d ranks", run, step, config.steps, parts.stream.num_samples, ranks
    )

    while step < config.steps:
        # One optimizer step. Half-gathered gradients are in no checkpoint, so nothing is saved inside.
        loaded = interval.fetch(batches, config.accumulation)
        rows = to_device(distributed.summed(row_weights([one.batch for one in loaded], tasks)), device)
        learning_rate = base_learning_rate(engine)
        for one in loaded:
            batch = to_device(one.batch, device)
            with aside:
                lessons = teach(parts.teachers, batch)
            loss = objective(config.distill, tasks, batch, engine(batch), aside.joined(lessons), rows)
            # DeepSpeed averages over ranks and micro-steps; the loss is a share of a sum over both.
            engine.backward(loss.total * (ranks * config.accumulation))
            engine.step()
            interval.add(loss.total, loss.terms)
        step += 1

        stopping, last = stop.anywhere(), step == config.steps
        values: dict[str, float] = {}
        if last or step % config.log_every == 0:
            values = interval.read(config.global_batch, gradient_norm(engine))
            values |= {"optimizer/learning_rate": learning_rate, **skipped(engine)}
            monitor.quarantine(interval.damages)
            interval.require_sound(config.data.most_damaged)
            monitor.progress(step, values)
        if stopping or last or step % config.save_every == 0:
            log.info("saved %s", checkpoint.save(engine, run, config, parts.identity, step).folder)
        if parts.dev and not stopping and (last or step % config.evaluate_every == 0):
            values |= evaluate(engine, tasks, parts.dev, device).percents("dev")
        if values:
            monitor.scalars(step, values)
            interval.begin()
        if stopping and not last:
            log.info("told to stop; start the same command again to continue")
            break

    monitor.close()
    if step < config.steps:
        return CONTINUE
    if distributed.rank() == 0:
        newest = checkpoint.list_whole(run)[-1].folder
        save_model(run, parts.card, full_weights(newest))
    distributed.barrier()
    return DONE


def model_card(config: Config, tokenizer: Tokenizer) -> ModelCard:
    """What `config` trains, with a head for each of its tasks."""
    heads = {name: task.head(tokenizer.vocabulary) for name, task in config.active_tasks().items()}
    return ModelCard(config.model, heads, tuple(tokenizer.entries))


def build_teachers(config: Config, card: ModelCard, device: torch.device) -> tuple[Teacher, ...]:
    """The recipe's frozen teachers, outside of DeepSpeed: never in an optimizer, never in a checkpoint."""
    teachers = []
    for number, one in enumerate(config.teachers):
        key = f"teachers.{number}"
        answers = meaning_of([*read_answers(one.answers, f"{key}.answers").number]) if one.answers else ""
        teachers.append(build_teacher(one, card, config.soft_tasks(one), answers, device, key))
    return tuple(teachers)


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators of this rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def describe(config: Config, ranks: int) -> tuple[str, list[str]]:
    """What a run on so many ranks would be and cost, and what it still lacks: files that cannot be opened.

    Raises UserError for what is wrong with the recipe itself.
    """
    tokenizer = Tokenizer(config.data.vocabulary, config.model.max_text_length)
    card = model_card(config, tokenizer)
    with torch.device("meta"):
        model = build_model(card)
    check_multipliers(model, config.optimizer.multipliers)
    lacking: list[str] = []
    if config.initialise_from:
        with _noting(lacking):
            initialise_from(build_model(card), card, config.initialise_from, "initialise_from")
    teachers = assumed_teachers(config, card)
    with _noting(lacking):
        teachers = build_teachers(config, card, torch.device("cpu"))
    shards: list[str] = []
    of_sources = [shard for source in config.data.sources.values() for shard in source.shards]
    for folders in (config.data.shards, of_sources, config.data.dev):
        with _noting(lacking):
            shards += find_shards([name for name in folders if not is_remote(name)])
    facts = measure(config, card, ranks, teachers)
    return (
        f"{dump(config)}\nDeepSpeed, {ranks} ranks:\n{json.dumps(ds_config(config, ranks), indent=2)}\n\n"
        f"{table(facts)}\n\n{len(shards)} shards; {config.steps} steps of {config.global_batch} samples, "
        f"{config.micro_batch(ranks)} a rank and micro-step"
    ), lacking


@contextmanager
def _noting(lacking: list[str]) -> Iterator[None]:
    """Keep a user's mistake for later, so that all of them are told at once."""
    try:
        yield
    except UserError as error:
        lacking.append(str(error))


def assumed_teachers(config: Config, card: ModelCard) -> tuple[Teacher, ...]:
    """Teachers without weights, each a fusion encoder of the student's sizes: what is counted of those not at hand."""
    taught = []
    for one in config.teachers:
        soft = config.soft_tasks(one)
        sizes = replace(card.config, kind="fusion-encoder", text_norm="pre")
        with torch.device("meta"):
            model = build_model(card._replace(config=sizes, heads={task: card.heads[task] for task in soft}))
        model = model.to_empty(device="cpu").requires_grad_(False).eval()
        taught.append(Teacher(model, one.weight, frozenset(soft), None))
    return tuple(taught)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: RECIPE [key=value …] [--dry-run [--ranks=N]]; returns the exit code."""
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    options, words = ([a for a in given if a.startswith("--") == is_option] for is_option in (True, False))
    ranks = next((a.removeprefix("--ranks=") for a in options if a.startswith("--ranks=")), "1")
    try:
        unknown = [a for a in options if a != "--dry-run" and not a.startswith("--ranks=")]
        if not words or unknown or not ranks.isdecimal() or int(ranks) < 1:
            raise UserError(
                f"{' '.join(given) or 'nothing'} was given; write RECIPE [key=value …] [--dry-run [--ranks=N]]"
            )
        config = load(words[0], words[1:])
        if "--dry-run" in options:
            shown, lacking = describe(config, int(ranks))
            sys.stdout.write(f"{shown}\n")
            if lacking:
                raise UserError("it cannot start yet:\n  " + "\n  ".join(lacking))
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
    code = main()
    # All is written, and the group is left. Libraries' threads that outlive the interpreter may abort a rank that has
    # ended well ("terminate called without an active exception"), so nothing is taken down any more.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
