import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.models.mapping import MAPPINGS

DEPTHS = st.integers(1, 40).flatmap(lambda tower: st.tuples(st.just(tower), st.integers(1, tower)))


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("top", [[9], [10], [11]]),
        ("cross-layer", [[3], [7], [11]]),
        ("cumulative", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ],
)
def test_twelve_layers_feed_three_as_documented(name, groups):
    assert MAPPINGS[name](12, 3) == groups


@pytest.mark.parametrize("name", MAPPINGS)
@given(DEPTHS)
def test_every_fusion_layer_is_fed_in_rising_order_up_to_the_top(name, depths):
    tower, fusion = depths
    groups = MAPPINGS[name](tower, fusion)
    layers = [layer for group in groups for layer in group]
    assert len(groups) == fusion and all(groups)
    assert layers == sorted(set(layers))
    assert layers[0] >= 0 and layers[-1] == tower - 1


@given(DEPTHS)
def test_cumulative_groups_leave_no_layer_out(depths):
    groups = MAPPINGS["cumulative"](*depths)
    assert [layer for group in groups for layer in group] == list(range(depths[0]))
