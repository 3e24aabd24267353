import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_fusion import cli
from dist_fusion.monitor.events import record
from dist_fusion.status import as_text, show, size_in_words, spoken, status_of

STARTED = {"ranks": 2, "hosts": [socket.gethostname()], "job": None, "resumed_from": None, "versions": {}}
LINE = {
    "step": 30, "loss/total": 1.25, "loss/hard/itm": 0.5, "loss_max/total": 9.0, "speed/samples_per_s": 2000.0,
    "speed/step_s": 0.5, "time/left_s": 4000.0,
}  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that has begun."""
    run = tmp_path / "small"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("steps: 1000\nlog_every: 10\n")
    record(run, "started", 0, STARTED)
    return run


def write_line(run: Path, **changes: object) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**LINE, **changes}) + "\n")


def write_checkpoint(run: Path, step: int, size: int = 1000, told: int | None = None) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir()
    (folder / "shard.pt").write_bytes(b"x" * size)
    (folder / "manifest.json").write_text(json.dumps({"files": {"shard.pt": {"bytes": told or size}}}))


def test_a_run_that_holds_its_lock_is_running_and_tells_rate_and_time_left(run):
    write_line(run)
    with held(run):
        found = status_of(run)
        assert (found.state, found.why, found.step, found.ranks) == ("running", "here", 30, 2)
        assert (found.samples_per_s, found.left_s) == (2000.0, 4000.0)
        assert found.losses == {"total": 1.25, "hard/itm": 0.5}
        long_ago = time.time() - 3600
        os.utime(run / "metrics.jsonl", (long_ago, long_ago))
        assert status_of(run).state == "running", "it has just started, and has not come to its first line"
    assert status_of(run).state == "died"


def test_looking_at_a_run_does_not_keep_a_job_from_it(run):
    (run / "lock").touch()
    status_of(run)
    with held(run):
        assert status_of(run).state == "running"


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Another process holds the run."""
    program = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(run / "lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline()
    yield
    holder.stdin.close()
    assert holder.wait(30) == 0


def age(run: Path, seconds: float) -> None:
    """Let all that a run ever said be so old."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    for event in events:
        event["time"] -= seconds
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    then = time.time() - seconds
    os.utime(run / "metrics.jsonl", (then, then))


def test_a_run_that_holds_its_lock_and_says_nothing_is_silent(run):
    write_line(run)
    age(run, 3600)
    with held(run):
        found = status_of(run)
    assert found.state == "silent"
    assert "last line 1 h ago" in found.why


@pytest.mark.parametrize(("seconds", "state"), [(1, "running"), (3600, "silent")])
def test_a_run_on_another_machine_is_judged_by_its_last_line(run, seconds, state):
    record(run, "started", 10, {**STARTED, "hosts": ["node1", "node2"], "job": "77"})
    write_line(run)
    age(run, seconds)
    found = status_of(run)
    assert found.state == state
    assert "node1, node2, job 77, which cannot be seen from here" in found.why


@pytest.mark.parametrize(
    ("kind", "details", "state", "said"),
    [
        ("stopped", {"by": "SIGUSR1"}, "stopped", "by SIGUSR1"),
        ("failed", {"error": "the disk is full"}, "failed", "the disk is full"),
    ],
)
def test_a_run_that_has_ended_says_how(run, kind, details, state, said):
    write_line(run)
    record(run, kind, 30, details)
    found = status_of(run)
    assert found.state == state and said in found.why
    assert found.left_s is None


def test_a_finished_run_says_so_with_its_scores(run):
    record(run, "evaluated", 1000, {"scores": {"dev/vqa/all": 61.5}})
    record(run, "finished", 1000, {})
    (run / "model.safetensors").touch()
    found = status_of(run)
    assert (found.state, found.step, found.scores, found.scored_at) == ("finished", 1000, {"dev/vqa/all": 61.5}, 1000)


def test_restarts_and_what_was_skipped_are_counted(run):
    for step in (10, 20):
        record(run, "skipped", step, {"what": "loss/total"})
        record(run, "started", step, STARTED)
    record(run, "rolled back", 20, {"to": 10, "why": "20 in a row"})
    damages = [{"reason": "undecodable image"}, {"reason": "undecodable image"}, {"reason": "truncated tar"}]
    (run / "quarantine.jsonl").write_text("".join(f"{json.dumps(d)}\n" for d in damages) + '{"reason": "tor')
    found = status_of(run)
    assert (found.restarts, found.skipped_steps, found.rolled_back) == (2, 2, 1)
    assert found.skipped_samples == {"undecodable image": 2, "truncated tar": 1}
    assert "2 × undecodable image, 1 × truncated tar" in as_text(found, colours=False)


def test_the_last_checkpoint_is_the_newest_that_is_whole_and_all_of_them_take_room(run):
    write_checkpoint(run, 10)
    write_checkpoint(run, 20)
    write_checkpoint(run, 30, size=500, told=1000)
    (run / "checkpoints" / "step-00000040").mkdir()
    (run / "checkpoints" / "step-00000040" / "shard.pt").write_bytes(b"x" * 100)
    found = status_of(run)
    assert found.checkpoint is not None
    assert (found.checkpoint.step, found.checkpoint.folder, found.checkpoints) == (20, "step-00000020", 2)
    assert 2600 < found.disk < 2900


def test_a_folder_of_runs_has_a_line_for_each(run, capsys):
    other = run.parent / "set" / "other"
    other.mkdir(parents=True)
    (other / "config.yaml").write_text("steps: 5\n")
    assert cli.main(["status", str(run.parent)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["run", "state", "step"]
    assert "other" in first and "new" in first and "0/5" in first
    assert "small" in second and "died" in second
    assert cli.main(["status", str(run.parent), "--json"]) == 0
    assert [one["state"] for one in json.loads(capsys.readouterr().out)] == ["new", "died"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [(None, "is no run and holds none"), ("a: [", "is no run that can be read"), ("seed: 3\n", "KeyError: 'steps'")],
)
def test_what_is_no_run_is_said_in_one_message(tmp_path, capsys, recipe, message):
    if recipe is not None:
        (tmp_path / "config.yaml").write_text(recipe)
    assert cli.main(["status", str(tmp_path)]) == cli.MISTAKE
    assert message in capsys.readouterr().err


def test_only_a_terminal_gets_colours(run):
    assert "\033" not in show(run, as_json=False)
    assert "\033[31mdied" in as_text(status_of(run), colours=True)


def test_the_command_needs_no_torch(run):
    code = (
        "import sys; sys.argv[1:] = ['status', sys.argv[1]]; from dist_fusion.__main__ import main; done = main(); "
        "sys.exit(3 if 'torch' in sys.modules else done)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 of 1,000 (0.0 %)" in done.stdout


@settings(deadline=None)  # it writes files
@given(noise=st.binary(max_size=300))
def test_torn_and_foreign_bytes_in_any_file_are_passed_over(tmp_path_factory, noise):
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("steps: 1000\n")
    record(run, "started", 0, STARTED)
    write_line(run)
    for name in ("metrics.jsonl", "events.jsonl", "quarantine.jsonl"):
        with (run / name).open("ab") as file:
            file.write(b"#" + noise.replace(b"\n", b" "))
    found = status_of(run)
    assert (found.step, found.state, found.skipped_samples) == (30, "died", {})


@given(seconds=st.floats(0, 1e7))
def test_a_length_of_time_is_told_in_at_most_two_units(seconds):
    said = spoken(seconds)
    units = {"d": 86400, "h": 3600, "min": 60, "s": 1}
    words = said.split()
    total = sum(int(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert len(words) <= 4
    assert total <= round(seconds) < total + units[words[-1]] or words[-1] == "s"


@pytest.mark.parametrize(("count", "said"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3.2e9, "3.2 GB")])
def test_bytes_are_told_in_words(count, said):
    assert size_in_words(count) == said
