"""Whatever happens to a run, the same command brings it to the end it would have had: the same weights and losses.

`make faults` runs all of it and prints what was found; `make test` runs a few.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from dist_fusion.checkpoint.manifest import folder_at, list_whole
from dist_fusion.engine.ranks import free_port
from dist_fusion.monitor.events import read_events
from dist_fusion.train import CONTINUE, DONE, MISTAKE
from tests.faults.cases import CASES, KILL, STEP, USR1, WAIT, Case
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
def forging():
    forge = Forge()
    yield forge
    forge.close()


@pytest.fixture
def forge(forging):
    yield forging
    forging.end()


@pytest.fixture(scope="module")
def recipe(shards, tmp_path_factory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("faults"), shards)


@pytest.fixture(scope="module")
def undisturbed(forging, recipe, tmp_path_factory):
    """The digest of a run with some overrides that nothing happened to."""
    known: dict[tuple[str, ...], str] = {}

    def of(overrides: tuple[str, ...]) -> str:
        overrides = tuple(one for one in overrides if one.startswith("deepspeed="))
        if overrides not in known:
            trial = Trial(forging, recipe, tmp_path_factory.mktemp("undisturbed"), overrides)
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


def test_a_run_that_is_told_to_stop_while_it_scores_leaves_without_another_step(
    forge, recipe, undisturbed, told, tmp_path
):
    trial = Trial(forge, recipe, tmp_path, ())
    ended = trial.live(Point("dist_fusion.evaluate:_counted", 1, rank=1, signals=(signal.SIGUSR2,)))
    assert ended.codes == [CONTINUE] * RANKS, ended.log[-3000:]
    assert (last_step(trial.run), found(trial.run)) == (8, "5 8 whole")
    finished(trial, "SIGUSR2 to one rank, scoring", found(trial.run), 8, undisturbed, told)


def shorten(folder: Path) -> str:
    shard = next(folder.glob("*optim_states.pt"))
    os.truncate(shard, shard.stat().st_size // 2)
    return "has"


def flip(folder: Path) -> str:
    shard = max(folder.glob("*optim_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    return "is not what was saved"


def lose(folder: Path) -> str:
    (folder / "mp_rank_00_model_states.pt").unlink()
    return "is not there"


def flip_random_state(folder: Path) -> str:
    file = folder / "rank-1.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    return "rank-1.pt is not what was saved"


def cut_manifest(folder: Path) -> str:
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:200])
    return "manifest.json"


def lose_pointer(folder: Path) -> str:
    (folder.parent / "latest").write_text("step-99999999")
    return ""


DAMAGE = {
    "a shard cut in half": shorten,
    "one bit of a shard flipped": flip,
    "a file lost": lose,
    "one bit of a random state flipped": flip_random_state,
    "a manifest cut short": cut_manifest,
    "the pointer wrong": lose_pointer,
}


@pytest.mark.parametrize(
    ("name", "damage"),
    [pytest.param(name, of, id=name, marks=[] if of is flip else pytest.mark.faults) for name, of in DAMAGE.items()],
)
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    forge, recipe, undisturbed, told, tmp_path, name, damage
):
    trial = Trial(forge, recipe, tmp_path, (WAIT,))
    trial.live(Point(STEP, 13))
    words = damage(folder_at(trial.run, 10))
    finished(trial, name, found(trial.run), last_step(trial.run), undisturbed, told)
    assert resumed_from(trial.run) == (5 if words else 10)
    refused = [event for event in read_events(trial.run) if event.kind == "refused checkpoint"]
    assert [event.step for event in refused] == ([10] if words else [])
    if words:
        assert words in str(refused[0].details["why"])
        assert "DAMAGED checkpoint" in (tmp_path / "log.txt").read_text()


@pytest.mark.faults
def test_a_run_without_any_whole_checkpoint_is_not_begun_anew_by_itself(forge, recipe, undisturbed, told, tmp_path):
    trial = Trial(forge, recipe, tmp_path, (WAIT,))
    trial.live(Point(STEP, 13))
    for step in (5, 10):
        flip(folder_at(trial.run, step))
    ended = trial.live()
    assert ended.codes == [MISTAKE] * RANKS
    assert "no checkpoint of" in ended.log and "move the folder" in ended.log
    assert trial.live().codes == [MISTAKE] * RANKS, "nor when it is asked again"
    (trial.run / "checkpoints").rename(tmp_path / "away")
    finished(trial, "all checkpoints damaged; moved away", found(trial.run), last_step(trial.run), undisturbed, told)


@pytest.mark.faults
@pytest.mark.parametrize("mode", [(), (WAIT,)], ids=["beside the steps", "at once"])
def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(forge, recipe, undisturbed, told, tmp_path, mode):
    trial = Trial(forge, recipe, tmp_path, mode)
    with mounted(tmp_path, "size=2200k"):
        ended = trial.live()
        assert ended.codes == [MISTAKE] * RANKS, ended.log[-3000:]
        assert "cannot be written" in ended.log and "is whole. Make room" in ended.log
        assert "Traceback" not in ended.log
        before, steps = found(trial.run), last_step(trial.run)
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        finished(trial, f"disk full, saving {'at once' if mode else 'beside'}", before, steps, undisturbed, told)


@pytest.mark.faults
def test_a_disk_that_is_full_to_the_last_byte_is_told_by_whoever_writes_the_next_line(forge, recipe, told, tmp_path):
    trial = Trial(forge, recipe, tmp_path, ("steps=4000", "evaluate_every=0", "save_every=4000"))
    with mounted(tmp_path, "size=64m"):
        forge.start(RANKS, trial.arguments(), tmp_path / "log.txt")
        wait_for(lambda: last_step(trial.run) > 7)
        subprocess.run(["dd", "if=/dev/zero", f"of={tmp_path / 'filler'}", "bs=4k"], stderr=subprocess.DEVNULL)
        ended = forge.ended()
        assert ended.codes[0] == MISTAKE
        (tmp_path / "filler").unlink()
        told("disk full, to the last byte", found=found(trial.run), resumed_from="", repeated="", digest="")


@pytest.mark.faults
def test_a_folder_that_becomes_read_only_ends_the_run_with_a_clear_message(forge, recipe, undisturbed, told, tmp_path):
    trial = Trial(forge, recipe, tmp_path, ("steps=4000", "log_every=4000", "evaluate_every=0", "save_every=100"))
    checkpoints = trial.run / "checkpoints"
    checkpoints.mkdir(parents=True)
    with mounted(checkpoints, "size=64m"):
        forge.start(RANKS, trial.arguments(), tmp_path / "log.txt")
        wait_for(lambda: list_whole(trial.run))
        wait_for(lambda: not subprocess.run(["mount", "-o", "remount,ro", str(checkpoints)]).returncode)
        ended = forge.ended()
        assert ended.codes == [MISTAKE] * RANKS, ended.log[-3000:]
        assert "Read-only file system" in ended.log and "is whole. Make room" in ended.log
        assert "Traceback" not in ended.log
        told("folder read-only", found=found(trial.run), resumed_from="", repeated="", digest="")


@pytest.mark.faults
def test_shards_that_vanish_end_the_run_with_a_clear_message(forge, recipe, shards, undisturbed, told, tmp_path):
    mine = tmp_path / "shards"
    mine.mkdir()
    for path in shards.iterdir():
        (mine / path.name).write_bytes(path.read_bytes())
    trial = Trial(forge, recipe, tmp_path, (f"data.shards=[{mine}]",))
    stopped = trial.live(Point(STEP, 12, signals=(USR1,)))
    assert stopped.codes == [CONTINUE] * RANKS
    log = tmp_path / "log.txt"
    pids = forge.start(RANKS, trial.arguments(), log, Point(STEP, 2, signals=(signal.SIGSTOP,)))
    wait_for(lambda: all(is_stopped(pid) for pid in pids))
    for tar in mine.glob("*.tar"):  # which are open: a file that is only renamed would still be read
        os.truncate(tar, 0)
        tar.unlink()
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    ended = forge.ended()
    assert ended.codes == [MISTAKE] * RANKS, ended.log[-3000:]
    assert "cannot be read" in ended.log
    before, steps = found(trial.run), last_step(trial.run)
    for tar in shards.glob("*.tar"):
        (mine / tar.name).write_bytes(tar.read_bytes())
    final = trial.live()
    assert final.codes == [DONE] * RANKS, final.log[-3000:]
    told("shards vanish; put back", found=before, resumed_from=resumed_from(trial.run),
         repeated=steps - resumed_from(trial.run), digest=digest(trial.run))  # fmt: skip
    assert digest(trial.run) == undisturbed(())


def test_a_time_budget_saves_and_says_continue(forge, recipe, undisturbed, told, tmp_path):
    trial = Trial(forge, recipe, tmp_path, ())
    ended = trial.live(None, "time_budget=0.00001")
    assert ended.codes == [CONTINUE] * RANKS, ended.log[-3000:]
    assert last_step(trial.run) == 1
    assert [event.details["by"] for event in read_events(trial.run) if event.kind == "stopped"] == [
        "time_budget of 1e-05 minutes"
    ]
    finished(trial, "time budget over", found(trial.run), last_step(trial.run), undisturbed, told)


def test_a_run_that_does_not_get_on_goes_back_and_if_that_does_not_help_it_stops(
    forge, recipe, undisturbed, told, tmp_path
):
    trial = Trial(forge, recipe, tmp_path, ("health.streak=3",))
    spoiled = Point("dist_fusion.train:objective", 13, "spoiled", 1, lasting=1000)
    ended = trial.live(spoiled)
    assert ended.codes == [1] * RANKS, ended.log[-3000:]
    assert "going back to step 10" in ended.log
    assert "3 steps in a row up to step 13 were dropped, also after going back to step 10" in ended.log
    assert "Traceback" not in ended.log
    assert "NaN" not in (trial.run / "metrics.jsonl").read_text()
    happened = [(event.kind, event.step) for event in read_events(trial.run)]
    assert [step for kind, step in happened if kind == "skipped"] == [13, 14, 15, 11, 12, 13]
    assert [step for kind, step in happened if kind == "rolled back"] == [15]
    finished(trial, "losses of one rank no numbers, for good", found(trial.run), 13, undisturbed, told)


def test_a_run_that_goes_back_from_a_passing_fault_ends_as_if_there_had_been_none(
    forge, recipe, undisturbed, told, tmp_path
):
    trial = Trial(forge, recipe, tmp_path, ("health.streak=3",))
    ended = trial.live(Point("dist_fusion.train:objective", 13, "spoiled", 1, lasting=3))
    assert ended.codes == [DONE] * RANKS, ended.log[-3000:]
    told("losses of one rank no numbers, for three steps", found="5 10 whole", resumed_from=10, repeated=5,
         digest=digest(trial.run))  # fmt: skip
    assert digest(trial.run) == undisturbed(())


@pytest.mark.faults
@pytest.mark.parametrize("how", ["asleep", "frozen"])
def test_a_standstill_ends_with_the_stack_of_every_rank(forge, recipe, undisturbed, told, tmp_path, how):
    trial = Trial(forge, recipe, tmp_path, ())
    ended = trial.live(Point("dist_fusion.monitor.interval:Interval.fetch", 9, how, 1), "health.hang_minutes=0.15")
    assert ended.codes == [1] * RANKS, ended.log[-3000:]
    assert "rank 0 has made no progress for 0.15 minutes" in ended.log
    waits, stands = ((trial.run / "logs" / f"rank-{rank}.stacks").read_text() for rank in range(RANKS))
    assert "summed" in waits and "go_on" in waits, "rank 0 waits for the other one"
    assert f"in _{how}" in stands and "go_on" in stands
    finished(trial, f"a rank stands still ({how})", found(trial.run), last_step(trial.run), undisturbed, told)


@pytest.mark.faults
def test_a_run_outlives_the_death_of_its_launcher(forge, recipe, undisturbed, told, tmp_path):
    """DeepSpeed's launcher, killed, leaves its ranks alone: they go on, and nobody else may take the run meanwhile."""
    trial = Trial(forge, recipe, tmp_path, ())
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", str(free_port()),
        "--module", "dist_fusion.train", *trial.arguments(),
    ]  # fmt: skip
    launcher = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: last_step(trial.run) > 2)
    for pid in [*children(launcher.pid), launcher.pid]:
        os.kill(pid, KILL)
    launcher.wait()
    refused = trial.live()
    held = refused.codes == [MISTAKE] * RANKS and "is being trained by another job" in refused.log
    assert held or refused.codes == [DONE] * RANKS, refused.log[-3000:]
    (trial.run / "STOP").touch()
    wait_for(lambda: not any(alive(int(path.read_text())) for path in (trial.run / "logs").glob("*.pid")))
    finished(trial, "the launcher killed; its ranks stopped", found(trial.run), last_step(trial.run), undisturbed, told)


@pytest.mark.parametrize(
    ("ranks", "then", "deepspeed", "dropout"),
    [
        pytest.param(2, 1, "zero1", 0.0),
        pytest.param(1, 2, "zero3", 0.0, marks=pytest.mark.faults),
        pytest.param(4, 2, "zero2", 0.0, marks=pytest.mark.faults),
        pytest.param(2, 1, "zero3", 0.3, marks=pytest.mark.faults),
        pytest.param(1, 2, "zero2", 0.3, marks=pytest.mark.faults),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(forge, recipe, told, tmp_path, ranks, then, deepspeed, dropout):
    """Without dropout its losses are those of the old number of ranks; with it the samples are."""
    common = (f"deepspeed={deepspeed}", f"model.dropout={dropout}", "global_batch=16")
    whole, parts = Trial(forge, recipe, tmp_path / "whole", common), Trial(forge, recipe, tmp_path / "parts", common)
    for trial in (whole, parts):
        trial.folder.mkdir()
    ended = whole.live(ranks=ranks)
    assert ended.codes == [DONE] * ranks, ended.log[-3000:]
    assert parts.live(Point(STEP, 13), ranks=ranks).codes == [-KILL] * ranks
    steps = last_step(parts.run)
    ended = parts.live(ranks=then)
    assert ended.codes == [DONE] * then, ended.log[-3000:]
    assert f"was saved by {ranks} ranks; it is dealt anew" in ended.log
    begun = resumed_from(parts.run)
    mine, theirs = (logged(trial.run, "loss/total") for trial in (parts, whole))
    assert [step for step, _ in mine] == [step for step, _ in theirs] == list(range(1, 25))
    apart = max(abs(one - other) / abs(other) for (_, one), (_, other) in zip(mine, theirs, strict=True))
    told(f"killed on {ranks} ranks, ended on {then} ({deepspeed}, dropout {dropout})", found=found(parts.run),
         resumed_from=begun, repeated=steps - begun, digest=f"losses within {apart:.1e}")  # fmt: skip
    assert apart < (0.2 if dropout else 1e-5)
    lonely = [logged(trial.run, "data/without_partner") for trial in (parts, whole)]  # counted in each life
    drawn = [[after - before for (_, before), (_, after) in pairwise(counts[begun:])] for counts in lonely]
    assert drawn[0] == drawn[1], "the same samples in the same blocks"


def logged(run: Path, key: str) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[key]) for line in lines if key in line]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own at `folder`."""
    if os.getuid():
        pytest.skip("only root can mount a file system")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait_for(condition) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "nothing happened for a minute and a half"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
