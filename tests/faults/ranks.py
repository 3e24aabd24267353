"""Ranks that can be killed: forked from one process that has imported everything, so that a life costs a second.

    python -m tests.faults.ranks     reads a line of JSON for each life, writes its processes, then how they ended

A rank is a process of its own that runs `train.main` on the arguments it is given; only how it dies is added.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.faults.points import Point

ROOT = Path(__file__).parents[2]
PATIENCE = 20.0
"""Seconds that the ranks which are left get to see that one is gone; then the launcher would kill them, too."""


class Ended(NamedTuple):
    """How the ranks of a life ended: exit codes, or minus a signal."""

    codes: list[int]
    log: str


class Forge:
    """Starts lives of a run, one after the other."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.ranks"], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self._pids: list[int] = []

    def start(self, ranks: int, arguments: list[str], log: Path, point: Point | None = None) -> list[int]:
        """Begin a life; returns its processes."""
        self._log, self._pids = log, []
        order = {"ranks": ranks, "arguments": arguments, "log": str(log), "point": point and point._asdict()}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._pids = json.loads(self._process.stdout.readline())
        return self._pids

    def ended(self) -> Ended:
        """Wait for the end of the life that was begun."""
        line = self._process.stdout.readline()
        assert line, "the process that forks has died"
        self._pids = []
        return Ended(json.loads(line), self._log.read_text())

    def live(self, ranks: int, arguments: list[str], log: Path, point: Point | None = None) -> Ended:
        """A life from its beginning to its end."""
        self.start(ranks, arguments, log, point)
        return self.ended()

    def end(self) -> None:
        """Kill what a test has left of a life."""
        if self._pids:
            for pid in self._pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.ended()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)


def serve() -> None:
    """Fork lives until nobody asks for one any more."""
    from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  else each life would import it anew: seconds

    from dist_fusion import train
    from dist_fusion.engine.ranks import free_port

    for line in sys.stdin:
        order = json.loads(line)
        environment = {"WORLD_SIZE": str(order["ranks"]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        pids = []
        for rank in range(order["ranks"]):
            pid = os.fork()
            if not pid:
                os.setpgid(0, pids[0] if pids else 0)
                os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
                _live(train.main, order, rank)
            pids.append(pid)
        _say(pids)
        _say(_wait(pids))


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _live(main: object, order: dict, rank: int) -> None:
    """The life of one rank. Never returns."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDONLY) if stream == 0 else log, stream)
    code = 1
    try:
        if order["point"]:
            Point(**order["point"]).arm(rank)
        code = main(order["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int]) -> list[int]:
    """How each process ended; those that outlive another one's failure for too long are killed, as launchers do."""
    codes: dict[int, int] = {}
    end = float("inf")
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] not in (0, 75):
                    end = min(end, time.monotonic() + PATIENCE)
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    serve()
