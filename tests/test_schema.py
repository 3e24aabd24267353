from dataclasses import asdict, dataclass, field
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.schema import UserError, build, nearest, one_of, section

SOUNDS = {"bark": 1, "meow": 2}


@section
@dataclass(frozen=True)
class Animal:
    sound: Annotated[str, one_of(SOUNDS)]
    legs: int = 4
    sizes: tuple[float, ...] = ()


@section
@dataclass(frozen=True)
class Farm:
    first: Animal
    second: Animal | None = None
    names: tuple[str, ...] = field(default=())


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"first": {"sound": "bark", "leg": 3}}, "unknown key 'first.leg'; did you mean 'legs'?"),
        ({"first": {"sound": "bark"}, "second": {"sonud": 1}}, "unknown key 'second.sonud'; did you mean 'sound'?"),
        ({"first": {"sound": "bark", "x": 3}}, "unknown key 'first.x'; known keys: legs, sizes, sound"),
        ({"First": {}, "first": {"sound": "bark"}}, "unknown key 'First'; did you mean 'first'?"),
        ({}, "first is missing"),
        ({"first": {}}, "first.sound is missing"),
        ({"first": {"sound": "moo"}}, "first.sound is 'moo': it can be bark, meow"),
        ({"first": {"sound": "barks"}}, "it can be bark, meow; did you mean 'bark'?"),
        ({"first": {"sound": "bark", "legs": "four"}}, "first.legs is 'four': Input should be a valid integer"),
        ({"first": {"sound": "bark", "sizes": [1, "x"]}}, "first.sizes.1 is 'x': Input should be a valid number"),
        ({"first": 3}, "first is 3"),
        (None, "recipe is None"),
    ],
)
def test_a_wrong_tree_gets_its_key_and_what_would_be_right(tree, message):
    with pytest.raises(UserError) as error:
        build(Farm, tree, "farm.yaml")
    assert str(error.value).startswith("farm.yaml:\n")
    assert message in str(error.value)


def test_all_wrong_keys_are_told_at_once():
    with pytest.raises(UserError) as error:
        build(Farm, {"first": {"sound": "moo", "legs": "x"}, "nmaes": []}, "farm.yaml")
    assert all(key in str(error.value) for key in ("first.sound", "first.legs", "nmaes"))


animals = st.builds(
    Animal, sound=st.sampled_from(sorted(SOUNDS)), legs=st.integers(), sizes=st.lists(st.floats(width=32)).map(tuple)
)


@settings(max_examples=50, deadline=None)
@given(st.builds(Farm, first=animals, second=st.none() | animals, names=st.lists(st.text()).map(tuple)))
def test_a_section_is_built_from_its_own_fields(farm):
    assert str(build(Farm, asdict(farm), "farm.yaml")) == str(farm)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8), st.sets(st.text(max_size=8)))
def test_the_nearest_name_is_a_known_one(name, known):
    hint = nearest(name, known)
    assert hint == "" or any(repr(other) in hint for other in known)


def test_only_a_near_name_is_offered():
    assert nearest("stepss", {"steps", "seed"}) == "; did you mean 'steps'?"
    assert nearest("quark", {"steps", "seed"}) == ""
