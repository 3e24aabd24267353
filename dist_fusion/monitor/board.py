"""The scalars, pictures and texts of a run: `metrics.jsonl` and TensorBoard from one place. Only rank 0 writes.

Keys are paths (`loss/total`, `loss/attention/bridge.t2i`, `speed/samples_per_s`, `memory/peak_gib`). A resumed run goes
on in the same files: what an earlier life logged after the step resumed from is dropped, in both.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dist_fusion.data.index import Damage
from dist_fusion.distributed import rank
from dist_fusion.monitor.lines import parsed

SCORED = ("loss/", "dev/")
"""Beginnings of the keys that a run is compared by."""


class Board:
    """Writes what a run shows of itself from `step` on."""

    def __init__(self, run: Path, step: int):
        self._active = rank() == 0
        if self._active:
            path = run / "metrics.jsonl"
            path.touch()
            end, self._told = _kept(path, step)
            os.truncate(path, end)
            self._file = path.open("a")
            # A run that starts anew drops everything, its recipe too, which is written at step 0.
            self._board = SummaryWriter(str(run / "tb"), purge_step=step + 1 if step else 0)
            self._quarantine = run / "quarantine.jsonl"
            listed = self._quarantine.read_text().splitlines() if self._quarantine.exists() else []
            self._listed = set(listed)
            self._step, self._last = step, dict(self._told)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write `values` of `step` everywhere, but for what an earlier life has told of the step resumed from."""
        if self._active:
            known = self._told if step == self._step else {}
            fresh = {key: value for key, value in values.items() if key not in known}
            if fresh:
                print(json.dumps({"step": step, **fresh}), file=self._file, flush=True)
            for key, value in fresh.items():
                self._board.add_scalar(key, value, step)
            self._board.flush()
            self._last |= values

    def text(self, name: str, text: str) -> None:
        """Show a text of the whole run, as it is."""
        if self._active:
            self._board.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), 0)
            self._board.flush()

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:
        """Show a picture [h, w, 3] of `step`."""
        if self._active:
            self._board.add_image(name, pixels, step, dataformats="HWC")
            self._board.flush()

    def compared_by(self, recipe: Mapping[str, object]) -> None:
        """Put the run, which has ended, into TensorBoard's table of runs: its recipe by key, and its last scores.

        Written into the run's own files; the writer's `add_hparams` would make another run of it.
        """
        if self._active:
            plain = {
                key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for key, value in recipe.items()
            }
            for summary in hparams(plain, {key: v for key, v in self._last.items() if key.startswith(SCORED)}):
                self._board.file_writer.add_summary(summary)

    def quarantine(self, damages: Iterable[Damage]) -> None:
        """List what could not be used in `quarantine.jsonl`, each once."""
        if self._active:
            lines = dict.fromkeys(json.dumps(damage._asdict()) for damage in damages)
            fresh = [line for line in lines if line not in self._listed]
            if fresh:
                with self._quarantine.open("a") as file:
                    file.writelines(f"{line}\n" for line in fresh)
                self._listed.update(fresh)

    def close(self) -> None:
        """Flush and let go of the files."""
        if self._active:
            self._file.close()
            self._board.close()


def _kept(metrics: Path, step: int) -> tuple[int, dict[str, float]]:
    """Bytes up to the last whole line of `step` or before, and all that is told there of `step`.

    A killed run leaves later lines, and may leave a torn one.
    """
    told: dict[str, float] = {}
    end = position = 0
    with metrics.open("rb") as file:
        for line in file:
            position += len(line)
            tree = parsed(line)
            if tree is not None and tree["step"] > step:
                break
            if tree is not None:
                end = position
                told |= tree if tree["step"] == step else {}
    return end, {key: value for key, value in told.items() if key != "step"}
