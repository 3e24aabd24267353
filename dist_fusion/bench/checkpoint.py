"""What a checkpoint costs a run: at once, and beside the steps. One rank, which so has the whole state to write."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_fusion import distributed
from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.pretraining import heads, lay, recipe
from dist_fusion.bench.timing import quantiles, spread
from dist_fusion.checkpoint.manifest import Position, folder_at
from dist_fusion.checkpoint.resuming import resume
from dist_fusion.checkpoint.saving import Saver
from dist_fusion.config import Config
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine.optimizer import build_engine
from dist_fusion.engine.ranks import start_ranks
from dist_fusion.engine.state import full_weights
from dist_fusion.models.student import Student
from dist_fusion.types import to_device

PLAIN = ("teachers=[]", "distill.targets=none", "distill.soft=0", "initialise_from=null", "keep_checkpoints=2")
SHARDING = {"cpu": "deepspeed=zero1", "cuda": "deepspeed=zero1-fp16"}
QUICK = (
    "model.width=32",
    "model.num_heads=4",
    "model.num_layers=2",
    "model.num_fusion_layers=1",
    "model.image_size=64",
)
ROUNDS = 3


class Save(NamedTuple):
    """What saves cost, in seconds: 20th, 50th and 80th percentiles of some rounds."""

    case: str
    sizes: dict[str, object]
    seconds: list[float]  # from the beginning to the manifest on disk
    stall: list[float]  # in which the run does nothing else
    stall_share: float  # of the seconds that a save at once takes, by medians
    slowdown: list[float]  # by how much all the steps beside a save took longer than as many without one

    def line(self) -> str:
        """The row for people."""
        return (
            f"{self.case:<26} {spread(self.seconds)} s   the run stands still {spread(self.stall)} s = "
            f"{self.stall_share:.1%} of a save at once   steps beside it take {spread(self.slowdown)} s longer"
        )


class Timed(NamedTuple):
    """Something else that is done with a checkpoint."""

    case: str
    sizes: dict[str, object]
    seconds: list[float]

    def line(self) -> str:
        """The row for people."""
        return f"{self.case:<26} {spread(self.seconds)} s"


class Trained(NamedTuple):
    """A student in its engine, and how to make a step of it."""

    config: Config
    engine: Any
    step: Callable[[Callable[[], None]], None]  # told what to wait for before the weights change


def rows(device: torch.device, quick: bool) -> Iterator[Save | Timed]:
    """Saves of the recipe `pretrain`'s student and its optimizer in the folder for temporary files; then loading."""
    if not torch.distributed.is_initialized():
        start_ranks()
    trained = _train(device, quick)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        at_once = _saves(trained, run, beside=False)
        beside = _saves(trained, run, beside=True)
        newest = folder_at(run, 2 * (ROUNDS + 1))
        sizes = {
            "parameters": sum(parameter.numel() for parameter in trained.engine.module.parameters()),
            "bytes": sum(path.stat().st_size for path in newest.iterdir()),
            "ranks": distributed.world_size(),
            "deepspeed": trained.config.deepspeed,
        }
        usual = quantiles(whole for whole, _, _ in at_once)[1]
        for case, found in (("saved at once", at_once), ("saved beside the steps", beside)):
            whole, stall, slowdown = (quantiles(column) for column in zip(*found, strict=True))
            yield Save(case, sizes, whole, stall, round(stall[1] / usual, 4), slowdown)
        for case, what in (
            ("verified and loaded", lambda: resume(trained.engine, run, 0)),
            ("put together as weights", lambda: full_weights(newest)),
            ("DeepSpeed's own save", lambda: trained.engine.save_checkpoint(str(run / "other"), tag="whole")),
        ):
            yield Timed(case, sizes, quantiles(_seconds(what) for _ in range(ROUNDS)))


def _train(device: torch.device, quick: bool) -> Trained:
    config = recipe(2, [*PLAIN, SHARDING[device.type], *(QUICK if quick else ())])
    tasks, laid = config.active_tasks(), lay(config, config.data.pad_multiple)
    batch = to_device(laid, device)
    student = Student(config.model, heads(config), VOCABULARY.size)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(student.to(device), config, 1)
    weights = row_weights([laid], tasks).to(device)

    def step(wait: Callable[[], None]) -> None:
        engine.backward(objective(config.distill, tasks, batch, engine(batch), (), weights).total)
        wait()
        engine.step()

    step(lambda: None)
    return Trained(config, engine, step)


def _saves(trained: Trained, run: Path, *, beside: bool) -> list[tuple[float, float, float]]:
    """Of each round: seconds of the save, seconds in which the run stood still, and by how much its steps took longer.

    One round warms up and is left out: it makes the memory that the copies of later ones use again.
    """
    saver = Saver(trained.engine, run, replace(trained.config, save_async=beside), {}, num_samples=10**6)
    usual = min(_seconds(lambda: trained.step(saver.hold)) for _ in range(ROUNDS))
    found, first = [], 1 + (ROUNDS + 1) * beside
    for number in range(first, first + ROUNDS + 1):
        begun = time.perf_counter()
        stall = _seconds(lambda: saver.begin(Position(step=number)))  # noqa: B023  called at once
        waited, steps = [0.0], 0
        since = time.perf_counter()
        while saver.busy:
            trained.step(lambda: waited.append(_seconds(saver.hold)))  # noqa: B023
            steps += 1
        longer = time.perf_counter() - since - steps * usual - sum(waited)
        stall += sum(waited) + _seconds(saver.finish)
        found.append((time.perf_counter() - begun, stall, max(longer, 0.0)))
        trained.step(saver.hold)  # beside which the one that is not kept any more is deleted, as in a run
    saver.close()
    return found[1:]


def _seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        what()
    return time.perf_counter() - began
