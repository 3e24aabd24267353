"""What the demo trains, in which order, with real DeepSpeed ranks started by the real `deepspeed` launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dist_fusion.engine import free_port
from dist_fusion.schema import UserError
from dist_fusion.train import CONTINUE

RANKS = 2
WITHOUT = ("teacher=null", "distill.targets=none", "distill.soft=0", "distill.hard=1")
"""What makes the undistilled student of a recipe: all the rest stays as it is."""


@dataclass(frozen=True)
class Stage:
    """One run of the demo."""

    name: str
    recipe: str
    part: str  # of the time table
    overrides: tuple[str, ...] = ()
    interrupted: bool = False  # stopped in the middle by a signal to one worker, and resumed


STAGES = (
    Stage("teacher-pretrain", "demo-teacher-pretrain", "teacher"),
    Stage("teacher-vqa", "demo-teacher-vqa", "teacher", ("initialise_from={seed}/teacher-pretrain",)),
    Stage(
        "student-pretrain", "demo-student-pretrain", "student", ("teacher.folder={seed}/teacher-pretrain",),
        interrupted=True,
    ),
    Stage(
        "student-vqa", "demo-student-vqa", "student",
        ("initialise_from={seed}/student-pretrain", "teacher.folder={seed}/teacher-vqa"),
    ),
    Stage("undistilled-pretrain", "demo-student-pretrain", "undistilled", WITHOUT),
    Stage(
        "undistilled-vqa", "demo-student-vqa", "undistilled", ("initialise_from={seed}/undistilled-pretrain", *WITHOUT)
    ),
)  # fmt: skip


def run_stage(stage: Stage, folder: Path, seed: int, steps: int) -> float:
    """Train one stage to its end, going on where an earlier call stopped; returns the seconds it took.

    Raises:
        RuntimeError: if it fails, with the last lines of its log.
    """
    runs = folder / f"seed-{seed}"
    run = runs / stage.name
    began = time.monotonic()
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS), "--master_port", str(free_port()),
        "--module", "dist_fusion.train", stage.recipe,
        f"name={stage.name}", f"runs={runs}", f"seed={seed}", f"steps={steps}", f"evaluate_every={steps}",
        f"data.shards=[{folder}/shards/train]", f"data.dev=[{folder}/shards/dev]",
        f"data.vocabulary={folder}/shards/vocab.txt", *(part.format(seed=runs) for part in stage.overrides),
    ]  # fmt: skip
    if stage.recipe.endswith("vqa"):
        command.append(f"tasks.vqa.answers={folder}/shards/answers.json")
    if (run / "model.safetensors").exists():
        return 0.0
    halfway = steps // 2
    if stage.interrupted and _step(run) < halfway:
        code = _watch(command, stage.name, run, steps, stop_at=halfway)
        if code != CONTINUE:
            raise RuntimeError(_failure(stage.name, run, code))
        tqdm.write(f"  {stage.name}: stopped at step {_step(run)} by a signal to one worker; all ranks saved; resuming")
    code = _watch(command, stage.name, run, steps, stop_at=None)
    if code != 0:
        raise RuntimeError(_failure(stage.name, run, code))
    return time.monotonic() - began


def _watch(command: Sequence[str], name: str, run: Path, steps: int, stop_at: int | None) -> int:
    """Run `command` behind a progress bar; at step `stop_at` one worker is told to stop. Returns the exit code."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = run.parent / f"{name}.log"
    run.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output, tqdm(total=steps, initial=_step(run), desc=f"{name:<21}", unit="step") as bar:
        bar.set_postfix_str("starting two ranks")
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.3)
                step = _step(run)
                if step > bar.n:
                    bar.set_postfix_str("")
                    bar.update(step - bar.n)
                if stop_at is not None and step >= stop_at:
                    os.kill(int((run / "logs" / f"rank-{RANKS - 1}.pid").read_text()), signal.SIGUSR2)
                    stop_at = None
        except BaseException:
            _stop_workers(process, run)
            raise
        bar.update(_step(run) - bar.n)
    return process.returncode


def _stop_workers(process: subprocess.Popen[bytes], run: Path) -> None:
    """Let the workers save and leave: the `deepspeed` runner does not forward signals."""
    tqdm.write("stopping; the run is saved and the same command continues it")
    (run / "STOP").touch()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def _step(run: Path) -> int:
    """The last step that the run logged."""
    try:
        last = (run / "metrics.jsonl").read_text().rstrip("\n").rsplit("\n", 1)[-1]
    except OSError:
        return 0
    return int(last.split(":", 1)[1].split(",", 1)[0]) if last.startswith('{"step"') and "," in last else 0


def _failure(name: str, run: Path, code: int) -> str:
    log = run.parent / f"{name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    return f"{name} ended with code {code}; the end of {log}:\n{tail}"


def choose_folder(runs: Path, size: str, fresh: bool) -> Path:
    """The demo's folder: the newest one, to go on in, or with `fresh` a new one beside it."""
    base = "demo" if size == "full" else f"demo-{size}"
    taken = [runs / base, *(runs / f"{base}-{n}" for n in range(2, 1000))]
    used = [folder for folder in taken if folder.exists()]
    if not fresh:
        return used[-1] if used else taken[0]
    free = next((folder for folder in taken if not folder.exists()), None)
    if free is None:
        raise UserError(f"{runs} holds too many demos; delete some")
    return free
