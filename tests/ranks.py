"""A reusable group of real ranks: processes that start DeepSpeed once and then run one check after the other.

A check is a function of this module's `CHECKS` table, called with JSON arguments on every rank; its JSON results come
back in the order of the ranks. Starting two ranks costs seconds, so all checks of a test session share them.
"""

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from dist_fusion.engine.ranks import free_port, start_ranks, stop_ranks

ROOT = Path(__file__).parents[1]
PATIENCE = 240.0
"""Seconds that a check may take."""


class Ranks:
    """`size` processes that run checks."""

    def __init__(self, size: int, log: Path):
        port = free_port()
        shared = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._log = log
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks"], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("a"),
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            )
            for rank in range(size)
        ]  # fmt: skip
        self._replies = [queue.SimpleQueue() for _ in self._processes]
        for process, replies in zip(self._processes, self._replies, strict=True):
            threading.Thread(target=self._listen, args=(process, replies), daemon=True).start()

    def run(self, check: str, **arguments: object) -> list:
        """The results of `check` on every rank; raises AssertionError with the trace of a rank that failed."""
        for process in self._processes:
            process.stdin.write(json.dumps([check, arguments]) + "\n")
            process.stdin.flush()
        replies = [self._reply(replies) for replies in self._replies]
        failed = [reply["trace"] for reply in replies if "trace" in reply]
        assert not failed, "\n".join(failed)
        return [reply["result"] for reply in replies]

    def _listen(self, process: subprocess.Popen, replies: queue.SimpleQueue) -> None:
        for line in process.stdout:
            if line.startswith("REPLY "):
                replies.put(json.loads(line.removeprefix("REPLY ")))
        replies.put(None)

    def _reply(self, replies: queue.SimpleQueue) -> dict:
        """The next one; if one rank fails inside a collective, the others wait there for longer than anybody would."""
        try:
            reply = replies.get(timeout=PATIENCE)
        except queue.Empty:
            reply = None
            for process in self._processes:
                process.kill()
        assert reply is not None, f"a rank died, or waits for one that failed:\n{self._log.read_text()[-6000:]}"
        if "trace" in reply:
            sys.stderr.write(reply["trace"])
        return reply

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
        for process in self._processes:
            process.wait(30)


def serve() -> None:
    """The life of one rank: read a check, run it, reply."""
    import torch

    from tests.checks import CHECKS

    torch.set_num_threads(1)
    start_ranks()
    for line in sys.stdin:
        name, arguments = json.loads(line)
        check: Callable[..., object] = CHECKS[name]
        try:
            reply = {"result": check(**arguments)}
        except Exception:
            reply = {"trace": traceback.format_exc()}
        sys.stdout.write(f"REPLY {json.dumps(reply)}\n")
        sys.stdout.flush()
    stop_ranks()


if __name__ == "__main__":
    serve()
