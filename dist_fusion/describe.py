"""A dry run: what a recipe would be and cost, and what it still lacks, with nothing started."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch

from dist_fusion.config import Config, dump
from dist_fusion.data.remote import is_remote
from dist_fusion.data.shards import find_shards
from dist_fusion.data.text import Tokenizer
from dist_fusion.engine.optimizer import check_multipliers
from dist_fusion.engine.sharding import ds_config
from dist_fusion.facts import Facts, measure, table
from dist_fusion.models.initial import initialise_from
from dist_fusion.models.teachers import Teacher
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.parts import build_teachers, model_card
from dist_fusion.schema import UserError


class Survey(NamedTuple):
    """What is known of a recipe before it runs."""

    facts: Facts
    shards: list[str]
    lacking: list[str]  # files that cannot be opened, each with what is wrong


def survey(config: Config, ranks: int) -> Survey:
    """What a run on so many ranks would cost, and what it still lacks.

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
    return Survey(measure(config, card, ranks, teachers), shards, lacking)


def describe(config: Config, ranks: int) -> tuple[str, list[str]]:
    """What a run on so many ranks would be and cost, and what it still lacks: files that cannot be opened.

    Raises UserError for what is wrong with the recipe itself.
    """
    facts, shards, lacking = survey(config, ranks)
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
