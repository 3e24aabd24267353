"""What a run is made of: models, teachers and data, as its recipe says, checked before anything is changed."""

from dataclasses import asdict, replace
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import nn

from dist_fusion import distributed
from dist_fusion.checkpoint.folder import folder_of
from dist_fusion.checkpoint.manifest import list_committed
from dist_fusion.config import Config
from dist_fusion.data.stream import Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.engine.optimizer import check_multipliers
from dist_fusion.engine.sharding import ds_config, sharding
from dist_fusion.facts import flops
from dist_fusion.models.execution import set_execution
from dist_fusion.models.initial import initialise_from
from dist_fusion.models.sources import source_digest
from dist_fusion.models.teachers import Teacher, build_teacher
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.monitor.console import log
from dist_fusion.monitor.peaks import peak_flops
from dist_fusion.monitor.pictures import Overlays, fixed_scenes
from dist_fusion.tasks import Task, to_score
from dist_fusion.tasks.vqa import read_answers
from dist_fusion.types import meaning_of


class Parts(NamedTuple):
    """What a run is made of, checked and in memory, before anything of it is on disk."""

    tasks: dict[str, Task]
    card: ModelCard
    model: nn.Module
    teachers: tuple[Teacher, ...]
    stream: Stream
    dev: Stream | None
    overlays: Overlays | None
    identity: dict[str, object]  # what must be as it was when the run is continued


def prepare(config: Config, device: torch.device) -> Parts:
    """Models and data as the recipe says. Raises UserError for what is wrong with either."""
    tasks = config.active_tasks()
    tokenizer = Tokenizer(config.data.vocabulary, config.model.max_text_length)
    card = model_card(config, tokenizer)
    torch.manual_seed(config.seed)
    model = build_model(card)
    check_multipliers(model, config.optimizer.multipliers)
    set_execution(model, activation_checkpointing=config.activation_checkpointing, compile=config.compile)
    goes_on = distributed.from_first(bool(list_committed(folder_of(config))))
    if config.initialise_from and not goes_on:
        fresh = initialise_from(model, card, config.initialise_from, "initialise_from")
        log.info("weights from %s; new heads: %s", config.initialise_from, ", ".join(fresh) or "none")
    teachers = build_teachers(config, card, device)
    plan = Plan(config.micro_batch(distributed.world_size()), distributed.rank(), distributed.world_size(), config.seed)
    stream = Stream(config.data, tasks, tokenizer, config.model.image_size, plan)
    held_out = replace(config.data, shards=config.data.dev, sources={})
    dev = None
    if config.evaluate_every:
        dev = Stream(held_out, to_score(tasks), tokenizer, config.model.image_size, plan, endless=False)
    overlays = None
    if config.overlays_every():
        shown = fixed_scenes(config.data, tasks, tokenizer, config.model.image_size, config.seed)
        overlays = Overlays(shown, teachers, tokenizer.entries, device)
    identity = {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        "heads": card.heads,
        "vocabulary": sha256("\n".join(card.vocabulary).encode()).hexdigest(),
        "teachers": [source_digest(teacher.source, "teachers") for teacher in config.teachers],
        "samples": stream.num_samples,
    }
    return Parts(tasks, card, model, teachers, stream, dev, overlays, identity)


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


def samples_at_peak(config: Config, parts: Parts, ranks: int, device: torch.device) -> float | None:
    """How many samples a second a rank's device could train at its peak, by the operations of its first micro-batch.

    None, and said why, where that is not known; and on all ranks but the first, which alone tells of it.
    """
    if distributed.rank() or device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(name, sharding(ds_config(config, ranks)).dtype)
    if peak is None:
        log.info("no speed/mfu: the peak of %s is not in dist_fusion.monitor.peaks", name)
        return None
    laid = next(iter(parts.stream)).batch
    return peak * config.micro_batch(ranks) / flops(parts.card, parts.teachers, laid)
