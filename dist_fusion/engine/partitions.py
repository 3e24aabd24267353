"""Where the elements of each parameter lie in the flat partitions that ZeRO gives to a number of ranks.

Stages 1 and 2 lay the parameters of a group end to end and cut that into equal partitions, wherever the cuts fall.
Stage 3 cuts each parameter by itself, and lays a rank's part of each end to end.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Elements of one parameter that lie side by side in a flat partition."""

    name: str  # of the parameter
    rank: int
    group: int  # which flat partition of the rank (ZeRO-3: of the sub-group)
    start: int  # where the piece begins in the partition
    offset: int  # where the piece begins in the flattened parameter
    length: int


def laid_by_group(slices: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, list[Piece]]:
    """The pieces of each parameter at stages 1 and 2, in the order of its elements.

    `slices[rank][group]` has the place (`start`, `numel`) of each parameter in the partition, as DeepSpeed keeps it.
    Pieces of one parameter follow one another in the order of ranks, so where each begins in it need not be told.
    """
    pieces: dict[str, list[Piece]] = {}
    for rank, groups in enumerate(slices):
        for group, places in enumerate(groups):
            for name, place in places.items():
                before = pieces.setdefault(name, [])
                offset = before[-1].offset + before[-1].length if before else 0
                before.append(Piece(name, rank, group, place.start, offset, place.numel))
    return pieces


def laid_by_parameter(shapes: Sequence[Mapping[str, Sequence[int]]], ranks: int) -> dict[str, list[Piece]]:
    """The pieces of each parameter at stage 3, in the order of its elements. `shapes[group]` is in the order of laying.

    Every rank has room for the same number of elements of a parameter; those of the last ranks may lie idle.
    """
    pieces: dict[str, list[Piece]] = {}
    for group, parameters in enumerate(shapes):
        start = 0
        for name, shape in parameters.items():
            length = prod(shape)
            room = share(length, ranks)
            pieces[name] = [
                Piece(name, rank, group, start, rank * room, min(room, length - rank * room))
                for rank in range(ranks)
                if rank * room < length
            ]
            start += room
    return pieces


def share(length: int, ranks: int) -> int:
    """The elements of a parameter of `length` that each rank has room for at stage 3."""
    return -(-length // ranks)
