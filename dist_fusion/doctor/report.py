"""The lines of all ranks as one page: a line once where all agree, else with those that say it."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dist_fusion.doctor.lines import FAIL, FIGURE, GRADES, WARN, Line

INDENT = 22


class Seat(NamedTuple):
    """Where a rank's findings come from."""

    rank: int
    host: str


def as_text(found: Sequence[Mapping[str, Sequence[Line]]], seats: Sequence[Seat], colours: bool) -> str:
    """What the ranks found, by check, in the order of the first rank's checks."""
    text = ""
    for check in dict.fromkeys(name for one in found for name in one):
        said: dict[Line, list[int]] = {}  # without figures: who says it
        for rank, one in enumerate(found):
            for line in dict.fromkeys(one.get(check, ())):
                who = said.setdefault(line._replace(figures=()), [])
                if who[-1:] != [rank]:
                    who.append(rank)
        for bare, ranks in said.items():
            figures = [
                line.figures for rank in ranks for line in found[rank][check] if line._replace(figures=()) == bare
            ]
            whose = "" if len(ranks) == len(found) else f"{_named([seats[rank] for rank in ranks])}: "
            text += _row(bare, check, whose + with_figures(bare.said, figures), colours)
    return text + f"{summary(found)}\n"


def with_figures(said: str, figures: Sequence[Sequence[float]]) -> str:
    """`said` with each FIGURE's value, from the smallest to the largest where ranks have several."""
    for values in zip(*figures, strict=True):
        low, high = (f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}" for value in (min(values), max(values)))
        said = said.replace(FIGURE, low if low == high else f"{low} to {high}", 1)
    return said


def _named(seats: Sequence[Seat]) -> str:
    """Ranks in words, by host: `node2 (ranks 8-15)`."""
    by_host: dict[str, list[int]] = {}
    for seat in seats:
        by_host.setdefault(seat.host, []).append(seat.rank)
    hosts = [f"{host} ({'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)})" for host, ranks in by_host.items()]
    return ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else "")


def spans(numbers: Sequence[int]) -> str:
    """Rising numbers in short: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def _row(line: Line, check: str, said: str, colours: bool) -> str:
    word = f"{line.grade:<4}"
    if colours:
        word = f"\033[{GRADES[line.grade]}m{word}\033[0m"
    text = f"{word}  {check:<14}  {_indented(said)}\n"
    return text + (f"{'':{INDENT}}→ {_indented(line.remedy)}\n" if line.remedy else "")


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n" + " " * INDENT)


def summary(found: Sequence[Mapping[str, Sequence[Line]]]) -> str:
    """How many checks are red and yellow on any rank, in words."""
    worst = [_worst(check, found) for check in dict.fromkeys(name for one in found for name in one)]
    red, yellow = worst.count(FAIL), worst.count(WARN)
    if not red and not yellow:
        return f"All {len(worst)} checks are well."
    return f"{red} of {len(worst)} checks failed, {yellow} to look at."


def _worst(check: str, found: Sequence[Mapping[str, Sequence[Line]]]) -> str:
    order = list(GRADES)
    return max((line.grade for one in found for line in one.get(check, ())), key=order.index, default=order[0])


def is_red(found: Sequence[Mapping[str, Sequence[Line]]]) -> bool:
    """Whether anything failed on any rank."""
    return any(line.grade == FAIL for one in found for lines in one.values() for line in lines)
