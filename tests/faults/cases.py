"""What may happen to a run of two ranks, each with what must be found afterwards.

A run of 24 steps saves at every 5th and scores at every 8th; unless a case says otherwise it is ZeRO-1 and saves beside
its steps, with loader workers and dropout.
"""

import signal
from typing import NamedTuple

from tests.faults.points import Point

KILL, TERM, USR1, USR2 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
STEP = "deepspeed:DeepSpeedEngine.step"
BACKWARD = "deepspeed:DeepSpeedEngine.backward"
SAVING = "dist_fusion.checkpoint.saving"
TAKEN = "dist_fusion.engine.shards:take_shards"
SHARD = "dist_fusion.checkpoint.saving:write_state"
TEXT = "dist_fusion.checkpoint.saving:write_text"


class Case(NamedTuple):
    """One thing that happens."""

    point: Point
    code: int = -KILL  # how the rank that it happens to ends
    overrides: tuple[str, ...] = ()
    quick: bool = False  # in the short list, too
    again: Point | None = None  # happens to the second life


WAIT, TWO, THREE, BF16 = "save_async=false", "deepspeed=zero2", "deepspeed=zero3", "deepspeed=zero2-bf16"

CASES: dict[str, Case] = {
    # in a step
    "one rank, before the first step": Case(Point("dist_fusion.train:learning_rates", 1, rank=1)),
    "one rank, waiting for data": Case(Point("dist_fusion.monitor.interval:Interval.fetch", 7, rank=1)),
    "one rank, in the forward": Case(Point("dist_fusion.train:objective", 9, rank=0), overrides=(TWO,)),
    "one rank, after the backward": Case(Point(BACKWARD, 8, "after", 1), overrides=(THREE,)),
    "all ranks, before an update": Case(Point(STEP, 13), quick=True),
    "one rank, after an update": Case(Point(STEP, 13, "after", 0), overrides=(BF16,)),
    "all ranks, writing metrics": Case(Point("dist_fusion.monitor.board:Board.scalars", 12)),
    "one rank, scoring": Case(Point("dist_fusion.train:evaluate", 2, rank=1)),
    "all ranks, after scoring": Case(Point("dist_fusion.train:evaluate", 2, "after")),
    # in the second save, of step 10
    "all ranks, before a save": Case(Point(f"{SAVING}:Saver.begin", 2)),
    "rank 0, the folder of a save just made": Case(Point(f"{SAVING}:Saver._make_room", 2, "after", 0)),
    "one rank, its state taken": Case(Point(TAKEN, 2, "after", 1), overrides=(THREE,)),
    "rank 0, while it copies": Case(Point("dist_fusion.checkpoint.copies:Copies.take", 2, rank=0)),
    "one rank, all copied": Case(Point("dist_fusion.checkpoint.copies:Copies.take", 2, "after", 1), overrides=(TWO,)),
    "rank 0, in the middle of the model's file": Case(Point("torch:save", 4, "within", 0), quick=True),
    "one rank, in the middle of its shard": Case(Point("torch:save", 3, "within", 1), overrides=(WAIT,)),
    "rank 0, before the name of its shard is on disk": Case(
        Point("dist_fusion.checkpoint.writing:sync_folder", 1, rank=0, path="step-00000010"), overrides=(WAIT,)
    ),
    "one rank, its shard written and its random state not": Case(Point(SHARD, 4, rank=1), overrides=(THREE,)),
    "all ranks, each with all its files": Case(Point(SHARD, 4, "after"), overrides=(WAIT, TWO)),
    "rank 0, before the manifest": Case(Point(f"{SAVING}:Saver._commit", 2, rank=0)),
    "rank 0, half of the manifest written": Case(Point(TEXT, 2, "torn", 0, path="manifest.json"), quick=True),
    "rank 0, between manifest and pointer": Case(Point(TEXT, 2, "after", 0, path="manifest.json")),
    "rank 0, half of the pointer written": Case(Point(TEXT, 2, "torn", 0, path="latest"), overrides=(WAIT,)),
    "rank 0, before it deletes an old one": Case(Point("shutil:rmtree", 1, rank=0, path="step-00000005")),
    "rank 0, an old one deleted": Case(Point("shutil:rmtree", 1, "after", 0, path="step-00000005"), overrides=(TWO,)),
    # at the end, and at the beginning
    "rank 0, before the model is written": Case(Point("dist_fusion.train:save_model", 1, rank=0)),
    "rank 0, the model half written": Case(Point("dist_fusion.models.weights:save_file", 1, rank=0)),
    "twice: before an update, and when it has just resumed": Case(
        Point(STEP, 13), again=Point("dist_fusion.engine.elastic:load_elastic", 1, "after", 1)
    ),
    "twice: before an update, and in the next save": Case(
        Point(STEP, 13), again=Point(f"{SAVING}:Saver._commit", 1, rank=0), overrides=(THREE,)
    ),
    # told to stop: all ranks save, nothing is done twice
    "SIGTERM to one rank": Case(Point(STEP, 7, rank=1, signals=(TERM,)), 75),
    "SIGUSR1 to rank 0": Case(Point(STEP, 7, rank=0, signals=(USR1,)), 75, overrides=(THREE,)),
    "SIGUSR2 to all ranks": Case(Point(STEP, 7, signals=(USR2,)), 75, quick=True),
    "SIGUSR2, and SIGTERM while it saves": Case(
        Point(f"{SAVING}:Saver.begin", 2, signals=(USR2,)), 75, overrides=("save_every=6",),
        again=Point(SHARD, 1, signals=(TERM, USR2, TERM)),
    ),
}  # fmt: skip
