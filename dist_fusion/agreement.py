"""How alike student and teacher attend, as two numbers a site, from a few pairs of a batch.

Both are read at log steps alone, without gradient and without random numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_fusion.models.teachers import Lesson
from dist_fusion.types import Tap, to_device

FEW = 8
"""Pairs that are looked at, so that the cost is bounded."""


def few_pairs(weight: Tensor) -> Tensor:
    """The pairs to look at: those that weigh most in attention distillation [P], the first of them; at most FEW."""
    return weight.argsort(descending=True, stable=True)[:FEW]


@torch.no_grad()
def attention_readings(taps: Mapping[str, Tap], lessons: Sequence[Lesson], pairs: Tensor) -> dict[str, Tensor]:
    """Of each site by path a sum over some pairs and their number, [2], on the taps' device.

    `attention/entropy/<site>` is the entropy of the student's rows in nats, that of `teacher.<site>` the teachers', and
    `attention/top_patch_match/<site>` the share of queries whose highest key is the same in student and teacher. Each
    is a mean over heads and valid queries; several teachers are averaged by weight. `pairs` are rows of the batch.
    """
    found: dict[str, Tensor] = {}
    ours = {site: _look(tap, pairs) for site, tap in taps.items()}
    for site, look in ours.items():
        found[f"attention/entropy/{site}"] = _total(entropy(look.rows), look)
    weight = sum(lesson.weight for lesson in lessons)
    for lesson in lessons:
        share = lesson.weight / weight
        theirs = {site: _look(tap, pairs) for site, tap in lesson.output.taps.items()}
        for site, look in theirs.items():
            _add(found, f"attention/entropy/teacher.{site}", _total(entropy(look.rows), look) * share)
        for site, look in ours.items():
            top = theirs[site.split(".")[-1]].top  # the word after the dot is the teacher's site
            top = top if lesson.head_map is None else torch.stack([top[:, head] for head in lesson.head_map], 1)
            _add(found, f"attention/top_patch_match/{site}", _total((look.top == top).float(), look) * share)
    return found


class _Look(NamedTuple):
    """How a site attends."""

    rows: Tensor  # [P, H, M, N]
    top: Tensor  # [P, H, M]: the highest key
    query_mask: Tensor  # [P, M]


def _look(tap: Tap, pairs: Tensor) -> _Look:
    few = to_device(pairs, tap.query.device)
    rows = attention(Tap(*(part.detach()[few] for part in tap)))
    return _Look(rows, rows.argmax(-1), tap.query_mask[few])


def attention(tap: Tap) -> Tensor:
    """The attention rows of a tap in fp32 [P, H, M, N], re-normalised over the valid keys (equations 7-8).

    Padding is emptied before the product, since it may hold anything.
    """
    query = tap.query.float().masked_fill(~tap.query_mask[:, None, :, None], 0)
    key = tap.key.float().masked_fill(~tap.key_mask[:, None, :, None], 0)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    return scores.masked_fill(~tap.key_mask[:, None, None, :], torch.finfo(scores.dtype).min / 2).softmax(-1)


def entropy(rows: Tensor) -> Tensor:
    """Of each row [..., N], in nats: 0 where one key has all, log N where all are equal."""
    return -torch.xlogy(rows, rows).sum(-1)


def _total(rows: Tensor, look: _Look) -> Tensor:
    """[P, H, M] -> the sum over pairs of the mean over heads and valid queries, and the number of pairs."""
    valid = look.query_mask.to(rows.dtype)
    by_pair = (rows.mean(1) * valid).sum(-1) / valid.sum(-1).clamp(min=1)
    return torch.stack([by_pair.sum(), by_pair.new_full((), len(by_pair))])


def _add(found: dict[str, Tensor], path: str, value: Tensor) -> None:
    found[path] = found[path] + value if path in found else value
