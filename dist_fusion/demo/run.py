"""The demo from shards to table. Run again, it continues; finished, it shows its table."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_fusion.checkpoint.folder import versions
from dist_fusion.config import load
from dist_fusion.data.prepare import easy_vqa
from dist_fusion.demo import answers, pictures, timing
from dist_fusion.demo.stages import STAGES, choose_folder, run_stage
from dist_fusion.schema import UserError


@dataclass(frozen=True)
class Size:
    """How much the demo trains."""

    steps: int | None  # of every stage; None is what its recipe says
    full_size_images: int  # in the timing at 12 layers


SIZES = {"full": Size(steps=None, full_size_images=2), "smoke": Size(steps=40, full_size_images=1)}
"""`full` is the demo; `smoke` runs the same stages in a few steps each, to see that they run."""


def demo(size: str, seeds: int, fresh: bool, runs: Path = Path("runs")) -> int:
    """Train and compare for seeds 0 to `seeds` - 1; returns the exit code. Raises UserError for an unknown size."""
    if size not in SIZES:
        raise UserError(f"--size is {size!r}; it can be {', '.join(SIZES)}")
    folder = choose_folder(runs, size, fresh)
    done = folder / "results.json"
    results = json.loads(done.read_text()) if done.exists() else {"by_seed": [], "seconds": {}}
    if len(results["by_seed"]) >= seeds:
        _say(f"This demo is finished; FRESH=1 starts another beside it.\n\n{(folder / 'results.md').read_text()}")
        return _goodbye(folder)
    seconds = _Seconds(folder / "seconds.json")
    steps = {stage.name: SIZES[size].steps or load(stage.recipe).steps for stage in STAGES}
    _say(f"The demo lives in {folder}. Stop it whenever you like: the same command goes on from there.\n")
    if not (folder / "shards" / "prepare.json").exists():
        with seconds.of("prepare"):
            for split, counts in easy_vqa.prepare(folder / "shards").items():
                _say(f"  {split:<5} " + ", ".join(f"{n:,} {what}" for what, n in counts._asdict().items()))
    for seed in range(seeds):
        if seeds > 1:
            _say(f"\nSeed {seed}")
        for stage in STAGES:
            with seconds.of(stage.part):
                run_stage(stage, folder, seed, SIZES[size].steps)
    torch.set_num_threads(2)
    with seconds.of("answer"):
        _say("\nAnswering the test questions …")
        by_seed = [answers.accuracy(folder, seed) for seed in range(seeds)]
    with seconds.of("timing"):
        _say("Timing inference …")
        timings = [timing.trained(folder, 0), timing.full_size(SIZES[size].full_size_images, 8)]
    with seconds.of("pictures"):
        picture = pictures.draw_attention(folder, 0)
    results = {
        "accuracy": answers.mean(by_seed),
        "by_seed": by_seed,
        "size": size,
        "steps": steps,
        "inference": [one._asdict() for one in timings],
        "timing_lines": [*timing.HEADER, *(one.line() for one in timings)],
        "seconds": seconds.rounded(),
        "versions": versions(),
    }
    answers.write(folder, results)
    _say(f"\n{(folder / 'results.md').read_text()}\nAttention of one word, teacher beside students: {picture}")
    return _goodbye(folder)


def _goodbye(folder: Path) -> int:
    _say(f"Run folder:  {folder.resolve()}\nTensorBoard: .venv/bin/tensorboard --logdir {folder}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


class _Seconds:
    """Seconds by part, kept on disk so that a continued demo counts what came before."""

    def __init__(self, path: Path):
        self._path = path
        self._parts: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, part: str, seconds: float) -> None:
        self._parts[part] = self._parts.get(part, 0.0) + seconds
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._parts))

    def of(self, part: str) -> "_Part":
        return _Part(self, part)

    def rounded(self) -> dict[str, float]:
        parts = {part: round(value, 1) for part, value in self._parts.items()}
        return {**parts, "total": round(sum(self._parts.values()), 1)}


class _Part:
    def __init__(self, seconds: _Seconds, part: str):
        self._seconds, self._part = seconds, part

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._seconds.add(self._part, time.monotonic() - self._began)
