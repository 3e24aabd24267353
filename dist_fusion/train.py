"""Train what a recipe says, from where its run stands.

    deepspeed --module dist_fusion.train RECIPE [key=value …]     one node, one rank a GPU
    torchrun -m dist_fusion.train RECIPE [key=value …]            the same
    python -m dist_fusion.train RECIPE [key=value …] --dry-run    check and show, start nothing

The same command resumes a run that was stopped, on as many ranks or on others.

Exit codes: 0 done; 75 saved, continue me (start the same command again); 2 the user's mistake; 1 failure.
"""

import errno
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_fusion import distributed
from dist_fusion.agreement import attention_readings, few_pairs
from dist_fusion.checkpoint.folder import claim, versions
from dist_fusion.checkpoint.manifest import Position, list_whole
from dist_fusion.checkpoint.randomness import seed_everything
from dist_fusion.checkpoint.resuming import resume
from dist_fusion.checkpoint.saving import Saver
from dist_fusion.config import Config, dump, load
from dist_fusion.data.stream import load_batches
from dist_fusion.describe import describe
from dist_fusion.distill import objective, row_weights
from dist_fusion.engine.optimizer import build_engine, gradient_norm, learning_rates, skipped
from dist_fusion.engine.ranks import compute_alike, start_ranks, stop_ranks, wait_at_most
from dist_fusion.engine.sharding import check_device, ds_config
from dist_fusion.engine.state import full_weights
from dist_fusion.engine.steps import Steps
from dist_fusion.evaluate import evaluate
from dist_fusion.health import Health, Unhealthy, Watch, patience_of, record_flights
from dist_fusion.models.execution import Aside
from dist_fusion.models.teachers import teach
from dist_fusion.models.weights import save_model
from dist_fusion.monitor.board import Board
from dist_fusion.monitor.console import log, progress_line, start_console
from dist_fusion.monitor.events import record
from dist_fusion.monitor.interval import Interval
from dist_fusion.parts import Parts, prepare, samples_at_peak
from dist_fusion.preemption import Stopped, StopRequest
from dist_fusion.schema import UserError, leaves
from dist_fusion.types import to_device

DONE, FAILURE, MISTAKE, CONTINUE = 0, 1, 2, 75
FULL = (errno.ENOSPC, errno.EDQUOT)


def train(config: Config, device: torch.device, stop: StopRequest) -> int:
    """Run the recipe to its end, or until told to stop; returns the exit code. Collective.

    Raises:
        UserError: for whatever is wrong with the recipe, its files or its run, before anything is changed.
        Unhealthy: if the run is of no use to continue as it is.
    """
    if config.deterministic:
        compute_alike(device)
    sharding = ds_config(config, distributed.world_size())
    check_device(config, sharding, device)
    parts = prepare(config, device)
    with claim(config, sharding, parts.identity) as run:
        if distributed.from_first((run / "model.safetensors").exists()):
            log.info("%s has ended; its model is there", run)
            return DONE
        logs = run / "logs"
        record_flights(os.environ, logs)
        stop.look_for(run / "STOP", config.time_budget)
        watch = Watch(config.health.hang_minutes, run)
        (logs / f"rank-{distributed.rank()}.pid").write_text(f"{os.getpid()}\n")
        try:
            return fit(config, parts, run, stop, watch, device)
        except Exception as error:
            tell_failed(run, error)
            if isinstance(error, OSError) and error.errno in FULL:
                raise UserError(
                    f"the disk of {run} is full ({error}). Its checkpoints are as they were; make room, and start the "
                    "same command again to continue"
                ) from error
            raise
        finally:
            watch.close()


def fit(config: Config, parts: Parts, run: Path, stop: StopRequest, watch: Watch, device: torch.device) -> int:
    """From the newest checkpoint to the end, or until told to stop; returns the exit code. Collective.

    A run that does not get on goes back to its newest checkpoint, once.
    """
    engine = build_engine(parts.model.to(device), config, distributed.world_size())
    wait_at_most(patience_of(config))
    seed_everything(config.seed + 1 + distributed.rank())
    saver = Saver(engine, run, config, parts.identity, parts.stream.num_samples)
    health = Health(config.health, Steps(engine), run)
    code = None
    try:
        position = resume(engine, run, config.seed)
        tell_started(run, position.step)
        while code is None:
            saver.last = position.step  # what is whole is never written again
            health.begin(position)
            code = go_on(config, parts, run, Life(engine, saver, health, stop, watch), position, device)
            if code is None:
                position = resume(engine, run, config.seed)
    finally:
        saver.close()
    if code == DONE and distributed.rank() == 0:
        save_model(run, parts.card, full_weights(list_whole(run)[-1].folder))
        record(run, "finished", config.steps, {})
    distributed.barrier()
    return code


class Life(NamedTuple):
    """What looks after a run while it goes on."""

    engine: Any
    saver: Saver
    health: Health
    stop: StopRequest
    watch: Watch


def go_on(config: Config, parts: Parts, run: Path, life: Life, position: Position, device: torch.device) -> int | None:
    """The loop, from `position` on; returns the exit code, or None to go back to the last checkpoint. Collective."""
    ranks, tasks, (engine, saver, health, stop, watch) = distributed.world_size(), parts.tasks, life
    ahead = parts.stream.starting_at(position.step * config.accumulation)
    batches = load_batches(ahead, config.data.num_workers, pin=device.type == "cuda")
    interval = Interval(device, config.global_batch, config.steps, samples_at_peak(config, parts, ranks, device))
    board, aside = Board(run, position.step), Aside(device, config.teacher_stream)
    if position.step == 0:
        board.text("recipe", dump(config))
    board.quarantine(parts.stream.damages)
    log.info(
        "%s: step %d of %d, %d samples an epoch, %d ranks",
        run, position.step, config.steps, parts.stream.num_samples, ranks,
    )  # fmt: skip

    wanted = False
    while True:
        if parts.dev and position.owes_scores(config.evaluate_every, config.steps):
            with interval.paused():
                saver.finish()  # scoring may take longer than a run has left
                try:
                    scores = evaluate(engine, tasks, stop.heard_over(watch.over(parts.dev)), device).percents("dev")
                except Stopped:
                    return leave(run, life, position, board)
                board.scalars(position.step, scores)
                if distributed.rank() == 0:
                    record(run, "evaluated", position.step, {"scores": scores})
                position, better = position.with_score(scores, config.keep_best)
                if better and saver.last != position.step:
                    saver.begin(position)
        if position.step == config.steps:
            break

        # One optimizer step. Half-gathered gradients are in no checkpoint, so nothing is saved inside.
        step = position.step + 1
        logged = step == config.steps or step % config.log_every == 0
        loaded = interval.fetch(batches, config.accumulation)
        rows = to_device(distributed.summed(row_weights([one.batch for one in loaded], tasks)), device)
        rates, readings = learning_rates(engine), {}
        for number, one in enumerate(loaded, 1):
            batch, last = to_device(one.batch, device), number == len(loaded)
            with aside, interval.phase("teacher"):
                lessons = teach(parts.teachers, batch)
            with interval.phase("student"):
                output = engine(batch)
                loss = objective(config.distill, tasks, batch, output, aside.joined(lessons), rows)
            if logged and last:
                readings = attention_readings(output.taps, lessons, few_pairs(one.batch.weights["attention"]))
            del output  # its taps need not outlive the way back
            with interval.phase("backward"):
                # DeepSpeed averages over ranks and micro-steps; the loss is a share of a sum over both.
                engine.backward(health.watched(loss, last=last) * (ranks * config.accumulation))
            saver.hold()
            with interval.phase("optimizer"):
                engine.step()
            interval.add(loss.total, loss.terms)
        position = position._replace(step=step, recent=(*health.recent,))
        watch.beat(step)

        made = health.look(step)
        if not made:
            interval.leave_out()
        told, writing, due = distributed.on_any_rank(bool(stop.reason()), saver.busy, saver.due)
        if logged:
            values = interval.read(step, gradient_norm(engine), readings) | rates | skipped(engine)
            values |= {"health/dropped": float(health.dropped)}
            board.quarantine(interval.damages)
            interval.require_sound(config.data.most_damaged)
            log.info("%s", progress_line(step, config.steps, values))
            board.scalars(step, values)
        with interval.paused():
            if health.hopeless:
                saver.finish()
                health.require_way_back(step)
                board.close()
                return None
            if not writing:
                saver.finish()
            wanted = wanted or due or step % config.save_every == 0
            # A dropped step is no place to come back to.
            if told:
                return leave(run, life, position, board)
            if step == config.steps or (wanted and made):
                saver.begin(position)
                wanted = False
            if parts.overlays and (step == config.steps or step % config.overlays_every() == 0):
                parts.overlays.show(engine, board, step)

    saver.finish()
    board.compared_by(dict(leaves(asdict(config))))
    board.close()
    return DONE


def leave(run: Path, life: Life, position: Position, board: Board) -> int:
    """Save what is not saved yet, and say by whom the run was told to stop; returns the exit code. Collective."""
    if life.saver.last != position.step:
        life.saver.begin(position)
    life.saver.finish()
    by = ", ".join(dict.fromkeys(reason for reason in distributed.gathered(life.stop.reason()) if reason))
    log.info("told to stop (%s); start the same command again to continue", by)
    if distributed.rank() == 0:
        record(run, "stopped", position.step, {"by": by})
    board.close()
    return CONTINUE


def tell_failed(run: Path, error: Exception) -> None:
    """Write into the diary what ended this rank, with the step where the run can go on.

    A mistake is told by all ranks alike, so the first one writes it; any other error by the ranks that met it.
    """
    if distributed.rank() == 0 or not isinstance(error, UserError | Unhealthy):
        whole = list_whole(run)
        with suppress(OSError):  # the folder may be what is wrong, and the error is told anyway
            said = f"rank {distributed.rank()}: {type(error).__name__}: {error}"
            record(run, "failed", whole[-1].step if whole else 0, {"error": said})


def tell_started(run: Path, step: int) -> None:
    """Write into the diary that a life of the run begins. Collective."""
    hosts = distributed.gathered(socket.gethostname())
    if distributed.rank() == 0:
        told = {"ranks": len(hosts), "hosts": sorted(set(hosts)), "job": os.environ.get("SLURM_JOB_ID")}
        record(run, "started", step, {**told, "resumed_from": step or None, "versions": versions()})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: RECIPE [key=value …] [--dry-run [--ranks=N]]; returns the exit code."""
    given = [a for a in (sys.argv[1:] if arguments is None else arguments) if not a.startswith("--local_rank")]
    options, words = ([a for a in given if a.startswith("--") == is_option] for is_option in (True, False))
    ranks = next((a.removeprefix("--ranks=") for a in options if a.startswith("--ranks=")), "1")
    try:
        unknown = [a for a in options if a != "--dry-run" and not a.startswith("--ranks=")]
        if not words or unknown or not ranks.isdecimal() or int(ranks) < 1:
            raise UserError(
                f"{' '.join(given) or 'nothing'} was given; write RECIPE [key=value …] [--dry-run [--ranks=N]]"
            )
        config = load(words[0], words[1:])
        if "--dry-run" in options:
            shown, lacking = describe(config, int(ranks))
            sys.stdout.write(f"{shown}\n")
            if lacking:
                raise UserError("it cannot start yet:\n  " + "\n  ".join(lacking))
            return DONE
        stop = StopRequest()
        record_flights(os.environ)
        device = start_ranks(patience_of(config))
        start_console()
        try:
            return train(config, device, stop)
        finally:
            stop.close()
            stop_ranks()
    except (UserError, Unhealthy) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node
            sys.stderr.write(f"dist-fusion: {error}\n")
        return MISTAKE if isinstance(error, UserError) else FAILURE


if __name__ == "__main__":
    code = main()
    # All is written, and the group is left. Libraries' threads that outlive the interpreter may abort a rank that has
    # ended well ("terminate called without an active exception"), so nothing is taken down any more.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
