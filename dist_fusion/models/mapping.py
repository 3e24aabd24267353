"""Which tower layers feed which fusion layer (table 7).

A mapping takes the two depths and returns, for each fusion layer, the group of tower layers that its bridge sums.
A new mapping is one function and one line in MAPPINGS.
"""

from collections.abc import Callable
from itertools import pairwise

Groups = list[list[int]]


def top(num_tower: int, num_fusion: int) -> Groups:
    """The last tower layers, one each: 12 and 3 give [[9], [10], [11]]."""
    return [[num_tower - num_fusion + i] for i in range(num_fusion)]


def cumulative(num_tower: int, num_fusion: int) -> Groups:
    """All tower layers, in consecutive groups: 12 and 3 give [[0..3], [4..7], [8..11]] (our reading)."""
    edges = [i * num_tower // num_fusion for i in range(num_fusion + 1)]
    return [list(range(a, b)) for a, b in pairwise(edges)]


def cross_layer(num_tower: int, num_fusion: int) -> Groups:
    """Evenly spaced tower layers, one each: 12 and 3 give [[3], [7], [11]] (our reading)."""
    return [[group[-1]] for group in cumulative(num_tower, num_fusion)]


MAPPINGS: dict[str, Callable[[int, int], Groups]] = {"top": top, "cross-layer": cross_layer, "cumulative": cumulative}
