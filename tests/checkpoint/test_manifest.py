import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.checkpoint.manifest import Position, altered, as_files, folder_at, list_committed, list_whole, problems
from dist_fusion.checkpoint.writing import write_state
from dist_fusion.schema import UserError


@pytest.fixture
def run(tmp_path):
    """A run with whole checkpoints of steps 5 and 10, of three files each."""
    for step in (5, 10):
        folder = folder_at(tmp_path, step)
        folder.mkdir(parents=True)
        written = [write_state(folder / f"{name}.pt", {"step": step, "name": name}) for name in "abc"]
        tree = {"position": Position(step)._asdict(), "files": as_files(written)}
        (folder / "manifest.json").write_text(json.dumps(tree))
    return tmp_path


def test_whole_checkpoints_are_listed_oldest_first(run):
    assert [saved.step for saved in list_whole(run)] == [5, 10]
    assert [altered(saved.folder, 0, 1) for saved in list_whole(run)] == [[], []]


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json"),
        (lambda folder: (folder / "b.pt").unlink(), "b.pt is not there"),
        (lambda folder: (folder / "b.pt").write_bytes(b"x"), "b.pt has 1 bytes in place of"),
    ],
    ids=["no manifest", "a torn one", "another one", "a lost file", "a short file"],
)
def test_what_is_not_whole_is_no_candidate_and_told(run, harm, told):
    harm(folder_at(run, 10))
    assert [saved.step for saved in list_whole(run)] == [5]
    assert told in problems(folder_at(run, 10))[0]


@settings(deadline=None)  # a disk may be busy
@given(parts=st.integers(1, 7), place=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_found_by_exactly_one_of_those_who_share_the_reading(
    tmp_path_factory, parts, place, bit
):
    folder = tmp_path_factory.mktemp("shared")
    written = [write_state(folder / f"{name}.pt", {"name": name}) for name in "abcde"]
    (folder / "manifest.json").write_text(json.dumps({"files": as_files(written)}))
    data = bytearray((folder / "c.pt").read_bytes())
    data[place % len(data)] ^= 1 << bit
    (folder / "c.pt").write_bytes(data)
    assert not problems(folder), "sizes do not tell"
    found = [line for part in range(parts) for line in altered(folder, part, parts)]
    assert found == ["c.pt is not what was saved"]


def test_a_checkpoint_that_was_whole_once_is_committed_whatever_became_of_it(run):
    (folder_at(run, 10) / "b.pt").unlink()
    folder_at(run, 15).mkdir()
    assert [folder.name for folder in list_committed(run)] == ["step-00000005", "step-00000010"]


def test_scores_are_owed_once_at_every_so_many_steps_and_at_the_end():
    owed, position = [], Position()
    for step in range(11):
        position = position._replace(step=step)
        if position.owes_scores(every=4, steps=10):
            owed.append(step)
            position, _ = position.with_score({"dev/vqa/all": 1.0}, "")
        assert not position.owes_scores(4, 10)
    assert owed == [4, 8, 10]


def test_the_best_score_is_the_first_of_the_highest():
    position, better = Position(), []
    for step, score in enumerate([50.0, 70.0, 70.0, 60.0, 71.0], 1):
        position, first = position._replace(step=step).with_score({"dev/vqa/all": score}, "dev/vqa/all")
        better.append(first)
    assert better == [True, True, False, False, True]
    assert (position.best, position.best_step, position.scored) == (71.0, 5, 5)
    assert Position(**json.loads(json.dumps(position._asdict()))) == position._replace(recent=[])
    with pytest.raises(UserError, match="did you mean 'dev/vqa/all'"):
        position.with_score({"dev/vqa/all": 1.0}, "dev/vqa/al")
