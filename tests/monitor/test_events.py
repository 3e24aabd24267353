import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion.monitor.events import FILE, Event, read_events, record
from dist_fusion.monitor.lines import append_line, read_lines

JSON = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))


def test_what_happened_is_read_back_in_order(tmp_path):
    record(tmp_path, "saved", 40, {"folder": tmp_path / "step-40", "seconds": 1.5, "bytes": 12})
    record(tmp_path, "finished", 41, {})
    saved, finished = read_events(tmp_path)
    assert saved[1:] == ("saved", 40, {"folder": str(tmp_path / "step-40"), "seconds": 1.5, "bytes": 12})
    assert finished[1:] == ("finished", 41, {})
    assert saved.time <= finished.time


def test_a_run_without_a_diary_has_no_events(tmp_path):
    assert read_events(tmp_path) == []


def test_an_event_of_no_known_kind_or_without_its_details_is_our_own_mistake(tmp_path):
    with pytest.raises(KeyError):
        record(tmp_path, "exploded", 1, {})
    with pytest.raises(AssertionError, match="'saved' must tell bytes, folder"):
        record(tmp_path, "saved", 1, {"seconds": 1})


def test_an_event_after_a_torn_line_is_not_lost_with_it(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"time": 1.0, "kind": "sav')
    record(tmp_path, "finished", 3, {})
    assert [event.kind for event in read_events(tmp_path)] == ["finished"]


@pytest.mark.parametrize("line", ["[1]", '"saved"', "{}", '{"time": "now", "kind": "saved", "step": 1, "details": {}}'])
def test_a_line_that_is_no_event_is_passed_over(tmp_path, line):
    (tmp_path / FILE).write_text(f"{line}\n")
    record(tmp_path, "finished", 3, {})
    assert [event.kind for event in read_events(tmp_path)] == ["finished"]


@settings(deadline=None)  # it writes files
@given(trees=st.lists(JSON, max_size=4), cut=st.integers(0, 200))
def test_of_a_torn_file_every_whole_line_is_read(tmp_path_factory, trees, cut):
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.touch()
    for tree in trees:
        append_line(path, tree)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    assert list(read_lines(path)) == trees[:whole]
    append_line(path, {"later": 1})
    kept = whole + (data[cut : cut + 1] == b"\n")  # a line that lost its end alone is whole after all
    assert list(read_lines(path)) == [*trees[:kept], {"later": 1}]


@settings(deadline=None)  # it writes files
@given(noise=st.binary(max_size=200))
def test_whatever_bytes_lie_between_do_not_hide_other_lines(tmp_path_factory, noise):
    run = tmp_path_factory.mktemp("run")
    record(run, "finished", 1, {})
    with (run / FILE).open("ab") as file:
        file.write(b"#" + noise)
    record(run, "finished", 2, {})
    assert [event.step for event in read_events(run)] == [1, 2]
    assert all(isinstance(event, Event) for event in read_events(run))
