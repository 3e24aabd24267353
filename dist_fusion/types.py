"""What travels through a training step, and nothing else.

Shape letters, everywhere in this package:

    I images    T texts    P pairs (image row, text row)    R rows that a task's head reads
    L text tokens    N image tokens    M query tokens    H heads    K head width    D model width    C classes
"""

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """What one task asks of a batch: the rows its head reads, and the answers to them.

    A batch carries one for each of its tasks, with zero rows if need be, so that every rank calls every head.
    """

    rows: Tensor  # [R, n] int64: pairs (n a row; -1 is none), (pair, position) of tokens, or (image row, text row)
    labels: Tensor  # [R] int64, [R, C] float scores, or [R, 2] content ids
    weight: Tensor  # [R] float: 0 where the row must not count
    kind: Tensor  # [R] int64: which of the task's kinds the row is scored under
    group: Tensor  # [R] int64 content id: the rows that are right only together


class Batch(NamedTuple):
    """Each distinct image and text once, and the pairs to fuse. Images first, then texts, in `pairs`."""

    images: Tensor  # [I, 3, h, w] normalised
    image_slot: Tensor  # [I] int64: modality row (NLVR2's second image has its own)
    image_id: Tensor  # [I] int64 content id
    text_ids: Tensor  # [T, L] int64
    text_mask: Tensor  # [T, L] bool, True at real tokens
    caption_id: Tensor  # [T] int64 content id: equal captions, equal ids
    pairs: Tensor  # [P, 2] int64 (image row, text row)
    pair_sample: Tensor  # [P] int64: which sample of the micro-batch a pair answers for
    weights: dict[str, Tensor]  # term -> [P] float
    targets: dict[str, Target]  # task -> what it asks


class Tap(NamedTuple):
    """What one attention layer shows to distillation: queries and keys of every pair, never the [M, N] map."""

    query: Tensor  # [P, H, M, K]
    key: Tensor  # [P, H, N, K]
    query_mask: Tensor  # [P, M] bool
    key_mask: Tensor  # [P, N] bool


class Output(NamedTuple):
    """What a student or a teacher returns."""

    logits: dict[str, Tensor]  # task -> what its head says
    taps: dict[str, Tap]  # site -> the tap there


class HeadSpec(NamedTuple):
    """The head a task needs: a kind (`models.heads.HEADS`), how many outputs, pairs to one row, and what they mean."""

    kind: str
    num_outputs: int
    num_pairs: int = 1
    meaning: str = ""  # digest of the outputs' names in their order, where a file gives them


def meaning_of(names: Sequence[str]) -> str:
    """Digest of the outputs of a head by name, in their order: what `HeadSpec.meaning` holds."""
    return sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


class Vocabulary(NamedTuple):
    """The token ids that the tasks must know."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, NamedTuple or dict of them, moved to `device` without waiting for the copy."""
    if isinstance(value, Tensor):
        if device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # of what is not pinned yet: a copy from elsewhere waits for the device
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: to_device(item, device) for name, item in value.items()}
    return type(value)(*(to_device(item, device) for item in value))
