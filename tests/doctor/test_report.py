from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.doctor.lines import FAIL, GRADES, OK, WARN, Case, Line, examined
from dist_fusion.doctor.report import Seat, as_text, is_red, spans, with_figures

SEATS = [Seat(0, "node1"), Seat(1, "node1"), Seat(2, "node2"), Seat(3, "node2")]


def test_a_check_has_one_line_where_all_ranks_agree():
    found = [{"disk": [Line(OK, "{} GB are free", "", (12.0 + rank,))]} for rank in range(4)]
    assert (
        as_text(found, SEATS, colours=False) == "ok    disk            12 to 15 GB are free\nAll 1 checks are well.\n"
    )


def test_ranks_that_differ_are_named_by_host_with_the_remedy():
    found = [{"ffmpeg": [Line(OK, "5.1")]}] * 2 + [{"ffmpeg": [Line(WARN, "not there", "install it")]}] * 2
    assert as_text(found, SEATS, colours=False).splitlines() == [
        "ok    ffmpeg          node1 (ranks 0-1): 5.1",
        "warn  ffmpeg          node2 (ranks 2-3): not there",
        "                      → install it",
        "0 of 1 checks failed, 1 to look at.",
    ]


def test_a_check_that_only_some_ranks_made_names_them():
    found = [{"python": [Line(OK, "3.11")]}, {"python": [Line(OK, "3.11")], "gpus": [Line(FAIL, "none")]}]
    text = as_text(found, SEATS[:2], colours=False)
    assert "FAIL  gpus            node1 (rank 1): none" in text and is_red(found)


def test_grades_have_their_colours_on_a_terminal_alone():
    found = [{"a": [Line(OK, "o")], "b": [Line(WARN, "w")], "c": [Line(FAIL, "f")]}]
    text = as_text(found, SEATS[:1], colours=True)
    assert [f"\033[{colour}m" in text for colour in GRADES.values()] == [True] * 3
    assert "\033" not in as_text(found, SEATS[:1], colours=False)


def test_words_of_an_error_are_not_taken_for_places_of_figures():
    assert with_figures("KeyError: {} in {x}", [()]) == "KeyError: {} in {x}"
    assert with_figures("{} GB, {} ms", [(1.0, 0.25), (1.0, 4000.0)]) == "1 GB, 0.25 to 4,000 ms"


@given(st.sets(st.integers(0, 40)))
def test_spans_name_every_number_once_and_in_order(numbers):
    named = []
    for part in filter(None, spans(sorted(numbers)).split(",")):
        first, _, last = part.partition("-")
        named += range(int(first), int(last or first) + 1)
    assert named == sorted(numbers)


def test_a_check_that_breaks_down_is_a_red_line():
    def breaks(case: Case) -> list[Line]:
        raise ZeroDivisionError("by {}")

    assert examined(breaks, None) == [Line(FAIL, "ZeroDivisionError: by {}")]
