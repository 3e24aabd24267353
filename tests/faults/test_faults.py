"""Whatever happens to a run, the same command brings it to the end it would have had: the same weights and losses.

`make faults` runs all of it and prints what was found; `make test` runs a few.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_fusion.checkpoint.manifest import list_whole
from dist_fusion.train import CONTINUE, DONE
from tests.faults.cases import CASES, KILL, WAIT, Case
from tests.faults.life import digest, found, last_step, resumed_from, write_recipe
from tests.faults.points import Point
from tests.faults.ranks import Ended, Forge

RANKS = 2


class Trial(NamedTuple):
    """A folder in which a run lives and dies."""

    forge: Forge
    recipe: Path
    folder: Path
    overrides: tuple[str, ...]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def live(self, point: Point | None = None, *more: str, ranks: int = RANKS) -> Ended:
        return self.forge.live(ranks, self.arguments(*more), self.folder / "log.txt", point)

    def arguments(self, *more: str) -> list[str]:
        return [str(self.recipe), f"runs={self.folder}", *self.overrides, *more]


@pytest.fixture(scope="module")
def forge():
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("faults"), shards)


@pytest.fixture(scope="module")
def undisturbed(forge, recipe, tmp_path_factory):
    """The digest of a run with some overrides that nothing happened to."""
    known: dict[tuple[str, ...], str] = {}

    def of(overrides: tuple[str, ...]) -> str:
        overrides = tuple(one for one in overrides if one != WAIT and not one.startswith("save_every"))
        if overrides not in known:
            trial = Trial(forge, recipe, tmp_path_factory.mktemp("undisturbed"), overrides)
            ended = trial.live()
            assert ended.codes == [DONE] * RANKS, ended.log[-3000:]
            known[overrides] = digest(trial.run)
        return known[overrides]

    return of


@pytest.fixture
def told(request, record_property):
    """Lines of the table that `make faults` prints."""
    path = os.environ.get("DIST_FUSION_FAULTS")

    def tell(what: str, **values: object) -> None:
        row = {"case": what, **values}
        for key, value in row.items():
            record_property(key, value)
        if path:
            with Path(path).open("a") as file:
                file.write(json.dumps(row) + "\n")

    return tell


def finished(trial: Trial, name: str, before: str, steps: int, undisturbed, told) -> None:
    """Let a run go on to its end, and compare."""
    ended = trial.live()
    assert ended.codes == [DONE] * RANKS, ended.log[-3000:]
    begun, final = resumed_from(trial.run), digest(trial.run)
    told(name, found=before, resumed_from=begun, repeated=steps - begun, digest=final)
    assert final == undisturbed(trial.overrides)


def chosen(quick: bool) -> list:
    return [
        pytest.param(name, case, id=name, marks=[] if case.quick else pytest.mark.faults)
        for name, case in CASES.items()
        if quick == case.quick
    ]


@pytest.mark.parametrize(("name", "case"), [*chosen(True), *chosen(False)])
def test_a_run_that_died_ends_as_if_it_had_not(forge, recipe, undisturbed, told, tmp_path, name: str, case: Case):
    trial = Trial(forge, recipe, tmp_path, case.overrides)
    for point in (case.point, case.again) if case.again and case.code == -KILL else (case.point,):
        ended = trial.live(point)
        struck = [code for rank, code in enumerate(ended.codes) if point.rank in (-1, rank)]
        assert struck == [case.code] * len(struck), ended.log[-3000:]
    steps, before = last_step(trial.run), found(trial.run)
    if case.code == CONTINUE:
        assert ended.codes == [CONTINUE] * RANKS
        assert list_whole(trial.run)[-1].step == steps, "all that was done is saved"
    finished(trial, name, before, steps, undisturbed, told)
    if case.code == CONTINUE:
        assert resumed_from(trial.run) == steps
