"""What the demo trains, in which order, with real DeepSpeed ranks started by the real `deepspeed` launcher."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from dist_fusion.checkpoint.folder import differences
from dist_fusion.config import load
from dist_fusion.engine.ranks import free_port
from dist_fusion.schema import UserError
from dist_fusion.train import CONTINUE, DONE, MISTAKE

RANKS = 2
WITHOUT = ("teachers=[]", "distill.targets=none", "distill.soft=0", "distill.hard=1")
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
        "student-pretrain", "demo-student-pretrain", "student", ("teachers.0.source={seed}/teacher-pretrain",),
        interrupted=True,
    ),
    Stage(
        "student-vqa", "demo-student-vqa", "student",
        ("initialise_from={seed}/student-pretrain", "teachers.0.source={seed}/teacher-vqa"),
    ),
    Stage("undistilled-pretrain", "demo-student-pretrain", "undistilled", WITHOUT),
    Stage(
        "undistilled-vqa", "demo-student-vqa", "undistilled", ("initialise_from={seed}/undistilled-pretrain", *WITHOUT)
    ),
)  # fmt: skip


def run_stage(stage: Stage, folder: Path, seed: int, steps: int | None) -> None:
    """Train one stage to its end, going on where an earlier call stopped; `steps` None is what its recipe says.

    Raises:
        UserError: if a finished run lies there that another recipe made, or a worker says so.
        Interrupted: if a worker was told to stop by somebody else: all is saved.
        RuntimeError: if it fails, with the last lines of its log.
    """
    runs = folder / f"seed-{seed}"
    run, overrides = runs / stage.name, _overrides(stage, folder, runs, seed, steps)
    config = load(stage.recipe, overrides)
    if (run / "model.safetensors").exists():
        changed = differences(run, config)
        if changed:
            raise UserError(f"{run} was made by another recipe ({changed[0]}); FRESH=1 starts a new demo")
        return
    command = [
        str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(RANKS), "--master_port", str(free_port()),
        "--module", "dist_fusion.train", stage.recipe, *overrides,
    ]  # fmt: skip
    halfway = config.steps // 2
    if stage.interrupted and _step(run) < halfway:
        code = _watch(command, stage.name, run, config.steps, stop_at=halfway)
        if code == CONTINUE:
            _say(f"  {stage.name}: a signal to one worker stopped it at step {_step(run)}; all ranks saved; resuming")
        elif code != DONE:  # it may have been faster than the signal
            raise _failure(stage.name, run, code)
    code = _watch(command, stage.name, run, config.steps, stop_at=None)
    if code == CONTINUE:
        raise Interrupted(f"{stage.name} was told to stop at step {_step(run)}; all is saved")
    if code != DONE:
        raise _failure(stage.name, run, code)


class Interrupted(Exception):
    """Somebody stopped a run of the demo; the same command continues it."""


def _overrides(stage: Stage, folder: Path, runs: Path, seed: int, steps: int | None) -> list[str]:
    steps = steps or load(stage.recipe).steps
    answers = [f"tasks.vqa.answers={folder}/shards/answers.json"] if stage.recipe.endswith("vqa") else []
    return [
        f"name={stage.name}", f"runs={runs}", f"seed={seed}", f"steps={steps}", f"evaluate_every={steps}",
        f"log_every={min(10, max(1, steps // 20))}", f"data.shards=[{folder}/shards/train]",
        f"data.dev=[{folder}/shards/dev]", f"data.vocabulary={folder}/shards/vocab.txt", *answers,
        *(part.format(seed=runs) for part in stage.overrides),
    ]  # fmt: skip


def _watch(command: Sequence[str], name: str, run: Path, steps: int, stop_at: int | None) -> int:
    """Run `command` behind a progress bar; at step `stop_at` one worker is told to stop. Returns the exit code."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    run.mkdir(parents=True, exist_ok=True)
    with (
        (run.parent / f"{name}.log").open("a") as output,
        tqdm(
            total=steps,
            initial=_step(run),
            desc=f"{name:<20}",
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,
        ) as bar,
    ):
        bar.set_postfix_str("starting two ranks")
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                step = _step(run)
                if step > bar.n:
                    bar.set_postfix_str("", refresh=False)
                    bar.update(step - bar.n)
                if stop_at is not None and step >= stop_at:
                    with contextlib.suppress(ProcessLookupError):  # it may just have ended
                        os.kill(int((run / "logs" / f"rank-{RANKS - 1}.pid").read_text()), signal.SIGUSR2)
                    stop_at = None
        except BaseException:
            _stop_workers(process, run)
            raise
        bar.set_postfix_str("", refresh=False)
        bar.update(_step(run) - bar.n)
    return process.returncode


def _stop_workers(process: subprocess.Popen[bytes], run: Path) -> None:
    """Let the workers save and leave, or end them: the `deepspeed` runner does not forward signals."""
    _say("stopping …")
    if (run / "logs" / "rank-0.pid").exists():  # they listen from then on
        (run / "STOP").touch()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):  # they are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _say(text: str) -> None:
    tqdm.write(text)


def _step(run: Path) -> int:
    """The last step that the run logged."""
    try:
        last = (run / "metrics.jsonl").read_text().rstrip("\n").rsplit("\n", 1)[-1]
    except OSError:
        return 0
    return int(last.split(":", 1)[1].split(",", 1)[0]) if last.startswith('{"step"') and "," in last else 0


def _failure(name: str, run: Path, code: int) -> Exception:
    log = run.parent / f"{name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    return (UserError if code == MISTAKE else RuntimeError)(f"{name} ended with code {code}; the end of {log}:\n{tail}")


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
