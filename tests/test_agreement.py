"""Against the formulas written out row by row in Python."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.agreement import FEW, attention, attention_readings, entropy, few_pairs
from dist_fusion.models.teachers import Lesson
from dist_fusion.types import Output, Tap

HEADS = 2


def tap(pairs, queries, keys, seed, *, heads=HEADS, dtype=torch.float32, padded=True, noise=0.0) -> Tap:
    """Random queries and keys; of pair p the last p queries and keys are padding, which holds `noise`."""
    draw = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(pairs, heads, queries, 4, generator=draw)
    key = 2 * torch.randn(pairs, heads, keys, 4, generator=draw)
    query_mask, key_mask = (torch.ones(pairs, n, dtype=torch.bool) for n in (queries, keys))
    for pair in range(pairs if padded else 0):
        query_mask[pair, max(1, queries - pair) :] = False
        key_mask[pair, max(1, keys - pair) :] = False
    query[~query_mask[:, None, :].expand(-1, heads, -1)] = noise
    key[~key_mask[:, None, :].expand(-1, heads, -1)] = noise
    return Tap(query.to(dtype), key.to(dtype), query_mask, key_mask)


def rows(one: Tap, pair: int, head: int) -> list[list[float]]:
    """The attention of each valid query over the valid keys, by the definition."""
    keys = [k for k in range(one.key.shape[2]) if one.key_mask[pair, k]]
    found = []
    for query in (q for q in range(one.query.shape[2]) if one.query_mask[pair, q]):
        scores = [float(one.query[pair, head, query] @ one.key[pair, head, k]) / math.sqrt(4) for k in keys]
        top = sum(math.exp(score - max(scores)) for score in scores)
        found.append([math.exp(score - max(scores)) / top for score in scores])
    return found


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def expected_entropy(one: Tap) -> float:
    pairs = range(len(one.query))
    return mean(
        mean(-sum(p * math.log(p) for p in row if p) for h in range(HEADS) for row in rows(one, pair, h))
        for pair in pairs
    )


def expected_match(ours: Tap, theirs: Tap, head_map=(0, 1)) -> float:
    def same(pair, head):
        both = zip(rows(ours, pair, head), rows(theirs, pair, head_map[head]), strict=True)
        return [mine.index(max(mine)) == other.index(max(other)) for mine, other in both]

    return mean(mean(s for head in range(HEADS) for s in same(pair, head)) for pair in range(len(ours.query)))


def lesson(taps, weight=1.0, head_map=None) -> Lesson:
    return Lesson(Output({}, taps), weight, frozenset(), head_map)


def told(readings) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in readings.items()}


@pytest.mark.parametrize("head_map", [None, (1, 0)])
def test_entropy_and_top_match_are_what_the_formulas_say_under_padding(head_map):
    ours = {"tower.t2i": tap(3, 5, 6, 0, noise=math.nan), "bridge.i2t": tap(3, 6, 5, 1)}
    theirs = {"t2i": tap(3, 5, 6, 2, noise=math.inf), "i2t": tap(3, 6, 5, 3)}
    values = told(attention_readings(ours, [lesson(theirs, head_map=head_map)], torch.arange(3)))
    for site, one in {**ours, **{f"teacher.{site}": one for site, one in theirs.items()}}.items():
        assert values[f"attention/entropy/{site}"] == pytest.approx(expected_entropy(one), abs=1e-5)
    for site in ours:
        match = expected_match(ours[site], theirs[site.split(".")[1]], head_map or (0, 1))
        assert values[f"attention/top_patch_match/{site}"] == pytest.approx(match, abs=1e-6)


def test_a_student_that_attends_as_its_teacher_matches_wholly():
    one = tap(2, 4, 5, 0)
    values = told(attention_readings({"tower.t2i": one}, [lesson({"t2i": one})], torch.arange(2)))
    assert values["attention/top_patch_match/tower.t2i"] == 1
    assert values["attention/entropy/tower.t2i"] == values["attention/entropy/teacher.t2i"]


def test_several_teachers_are_averaged_by_weight():
    ours, first, second = (tap(2, 4, 5, seed) for seed in range(3))
    lessons = [lesson({"t2i": first}, 3.0), lesson({"t2i": second}, 1.0)]
    values = told(attention_readings({"tower.t2i": ours}, lessons, torch.arange(2)))
    assert values["attention/entropy/teacher.t2i"] == pytest.approx(
        0.75 * expected_entropy(first) + 0.25 * expected_entropy(second), abs=1e-5
    )
    match = 0.75 * expected_match(ours, first) + 0.25 * expected_match(ours, second)
    assert values["attention/top_patch_match/tower.t2i"] == pytest.approx(match, abs=1e-6)


def test_without_a_teacher_only_the_own_entropy_is_told_and_without_pairs_nothing_counts():
    readings = attention_readings({"t2i": tap(2, 4, 5, 0)}, [], torch.arange(2))
    assert list(readings) == ["attention/entropy/t2i"]
    none = attention_readings({"t2i": tap(0, 4, 5, 0)}, [], torch.arange(0))
    assert none["attention/entropy/t2i"].tolist() == [0, 0]


def test_half_precision_is_read_in_fp32():
    one = tap(2, 4, 5, 0, dtype=torch.float16)
    values = told(attention_readings({"t2i": one}, [], torch.arange(2)))
    exact = Tap(one.query.float(), one.key.float(), *one[2:])
    assert values["attention/entropy/t2i"] == pytest.approx(expected_entropy(exact), abs=1e-6)


def test_only_a_few_pairs_are_looked_at_those_that_are_distilled_first():
    weight = torch.zeros(40)
    weight[[7, 30]] = 1.0
    assert few_pairs(weight).tolist() == [7, 30, *range(6)]
    assert len(few_pairs(torch.zeros(3))) == 3
    one = tap(40, 4, 5, 0, padded=False)
    assert attention_readings({"t2i": one}, [], few_pairs(weight))["attention/entropy/t2i"][1] == FEW


def test_looking_draws_no_random_numbers_and_leaves_no_gradient():
    one = tap(2, 4, 5, 0)
    asked = one._replace(query=one.query.clone().requires_grad_())
    before = torch.get_rng_state()
    readings = attention_readings({"t2i": asked}, [lesson({"t2i": one})], torch.arange(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(value.requires_grad for value in readings.values())


@given(seed=st.integers(0, 10**6), queries=st.integers(1, 6), keys=st.integers(1, 6), pairs=st.integers(1, 4))
def test_rows_sum_to_one_padding_gets_nothing_and_entropy_is_between_none_and_even(seed, queries, keys, pairs):
    one = tap(pairs, queries, keys, seed, noise=math.nan)
    shares = attention(one)
    torch.testing.assert_close(shares.sum(-1), torch.ones(pairs, HEADS, queries))
    for pair, key in product(range(pairs), range(keys)):
        if not one.key_mask[pair, key]:
            assert not shares[pair, :, :, key].any()
    least = entropy(shares)
    assert bool((least >= -1e-6).all())
    assert bool((least <= one.key_mask.sum(-1).log()[:, None, None] + 1e-5).all())
