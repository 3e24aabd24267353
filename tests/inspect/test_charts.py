import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.inspect.charts import MOST_BARS, WIDE, Mark, histogram, ranked


def bars(html: str) -> dict[str, int]:
    """What each bar says, and how many it counts."""
    told = (text.rsplit(": ", 1) for text in re.findall(r"<title>(.*?)</title>", html))
    return {name: int(count.replace(",", "")) for name, count in told}


@given(st.dictionaries(st.integers(0, 10**7), st.integers(1, 10**6), min_size=1), st.none() | st.integers(0, 10**4))
def test_every_value_is_in_one_bar_and_the_bars_are_few_and_within_the_picture(counts, mark):
    html = histogram(counts, Mark(mark, "mark") if mark is not None else None).html
    drawn = bars(html)
    assert sum(drawn.values()) == sum(counts.values())
    assert len(drawn) <= MOST_BARS + 2  # one for a width that does not begin with the lowest, and one for the rest
    places = [
        (float(x), float(w)) for x, w in re.findall(r'<rect class="bar" x="([^"]+)" y="[^"]+" width="([^"]+)"', html)
    ]
    assert len(places) == len(drawn) and all(x >= 0 and x + w <= WIDE + 1 for x, w in places)


def test_a_tail_far_away_is_one_bar():
    assert bars(histogram(Counter({1: 500, 2: 499, 90_000: 1})).html) == {"1": 500, "2": 499, "3 and more": 1}


def test_a_mark_stands_before_its_value():
    html = histogram(Counter({39: 1, 40: 2, 41: 3}), Mark(41, "cut at 40")).html
    line, after = re.search(r'line class="mark" x1="([\d.]+)"', html), re.findall(r'bar" x="([\d.]+)"', html)
    assert line and float(line[1]) == pytest.approx(float(after[2]))
    assert "cut at 40" in html


def test_values_are_told_on_their_scale():
    assert bars(histogram(Counter({10: 1, 13: 2}), scale=0.1).html) == {"1": 1, "1.3": 2}


def test_no_values_are_told():
    assert "none" in histogram({}).html


def test_the_most_frequent_names_come_first_and_the_others_are_counted():
    html = ranked(Counter(yes=6, no=3, blue=1), 2).html
    assert re.findall(r"yes|no\b|blue|60.0%|30.0%", html) == ["yes", "60.0%", "no", "30.0%"]
    assert "and 1 more" in html
