from collections import namedtuple
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.engine.partitions import laid_by_group, laid_by_parameter, share

Place = namedtuple("Place", "numel start")
GROUPS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=4)


def shapes_of(groups):
    return [{f"{g}.{n}": (length,) for n, length in enumerate(lengths)} for g, lengths in enumerate(groups)]


def sliced(shapes, ranks):
    """What DeepSpeed keeps at stages 1 and 2: each rank's part of the group laid end to end, and its room."""
    slices, rooms = [[{} for _ in shapes] for _ in range(ranks)], []
    for group, parameters in enumerate(shapes):
        total = sum(length for (length,) in parameters.values())
        rooms.append(2 * share(total, 2 * ranks))
        begin = 0
        for name, (length,) in parameters.items():
            for rank in range(ranks):
                left = rank * rooms[-1]
                first, last = max(begin, left), min(begin + length, left + rooms[-1])
                if first < last:
                    slices[rank][group][name] = Place(last - first, first - left)
            begin += length
    return slices, rooms


def check(shapes, pieces, rooms):
    """Every element of every parameter is in one place, and every place holds one element at most."""
    for group, parameters in enumerate(shapes):
        for name, (length,) in parameters.items():
            offset = 0
            for piece in pieces[name]:
                assert (piece.name, piece.group, piece.offset) == (name, group, offset)
                assert piece.length > 0 and piece.start + piece.length <= rooms[group]
                offset += piece.length
            assert offset == length
    places = sorted((p.rank, p.group, p.start, p.start + p.length) for of_one in pieces.values() for p in of_one)
    assert all(one[:2] != next[:2] or one[3] <= next[2] for one, next in pairwise(places))


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 9))
def test_every_element_of_a_group_that_was_cut_has_one_place(groups, ranks):
    shapes = shapes_of(groups)
    slices, rooms = sliced(shapes, ranks)
    check(shapes, laid_by_group(slices), rooms)


@settings(max_examples=80, deadline=None)
@given(GROUPS, st.integers(1, 9))
def test_every_element_of_parameters_that_were_cut_has_one_place(groups, ranks):
    shapes = shapes_of(groups)
    rooms = [sum(share(length, ranks) for length in lengths) for lengths in groups]
    check(shapes, laid_by_parameter(shapes, ranks), rooms)


def test_a_parameter_of_fewer_elements_than_ranks_leaves_the_last_ranks_idle():
    pieces = laid_by_parameter([{"scale": (3, 1), "bias": (4,)}], 4)
    assert [(p.rank, p.start, p.offset, p.length) for p in pieces["scale"]] == [
        (0, 0, 0, 1),
        (1, 0, 1, 1),
        (2, 0, 2, 1),
    ]
    assert {piece.start for piece in pieces["bias"]} == {1}
