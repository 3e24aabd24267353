"""What real ranks are asked to do in tests, each a function of JSON arguments with a JSON result."""

import contextlib
import hashlib
import io
import os
import signal
import threading
import time
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch.distributed import distributed_c10d as c10d

from dist_fusion import distributed
from dist_fusion.checkpoint.manifest import Position
from dist_fusion.config import load
from dist_fusion.data.stream import Loaded
from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.doctor import between
from dist_fusion.doctor.lines import Case
from dist_fusion.engine.elastic import load_elastic, load_recut
from dist_fusion.engine.optimizer import build_engine, learning_rates
from dist_fusion.engine.ranks import PATIENCE, wait_at_most
from dist_fusion.engine.sharding import ds_config
from dist_fusion.engine.state import SavedState
from dist_fusion.engine.steps import Steps
from dist_fusion.evaluate import evaluate
from dist_fusion.facts import flops
from dist_fusion.health import Health, Unhealthy
from dist_fusion.models.execution import set_execution
from dist_fusion.models.heads import ContrastHead, Features
from dist_fusion.monitor.events import read_events
from dist_fusion.monitor.interval import Interval
from dist_fusion.preemption import StopRequest
from dist_fusion.schema import UserError
from dist_fusion.train import train
from dist_fusion.types import Batch, HeadSpec
from tests import kept, tiny

CPU = torch.device("cpu")


def losses(
    recipe: str,
    overrides: list[str],
    stage: int,
    accumulation: int,
    counts: list[list[int]],
    finetuning: bool = False,
    dropout: float = 0.0,
) -> dict:
    """The global losses of some steps of this number of ranks, and what became of the teacher.

    `counts[step]` samples are dealt to micro-steps and ranks in contiguous, possibly unequal or empty shares, so that
    one process and many see the same samples in the same micro-steps.
    """
    config = load(recipe, [*overrides, f"deepspeed=zero{stage}", f"accumulation={accumulation}"])
    tasks, taught = (tiny.FINETUNING,) * 2 if finetuning else (tiny.PRETRAINING, tiny.TEACHING)
    slots = 2 if finetuning else 1
    student = tiny.model(tiny.model_config(num_slots=slots, dropout=dropout), tasks)
    set_execution(student, activation_checkpointing=config.activation_checkpointing, compile=config.compile)
    teacher = tiny.model(tiny.model_config("fusion-encoder", dropout=0.5, num_slots=slots), taught, seed=1)
    teacher = teacher.requires_grad_(False).eval()
    distill = DistillConfig(targets="both", soft=1.0)
    ranks, rank = distributed.world_size(), distributed.rank()
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(student, config, ranks)
    seen, start = [], 0
    for shares in counts:
        mine: list[Batch] = []
        for micro in range(accumulation):
            dealt = shares[2 * micro : 2 * micro + 2]  # of two ranks; one process takes both
            size, offset = (sum(dealt), 0) if ranks == 1 else (dealt[rank], sum(dealt[:rank]))
            mine.append(tiny.batch(tasks, tiny.samples(size, start=start + offset, paired=finetuning)))
            start += sum(dealt)
        rows = distributed.summed(row_weights(mine, tasks))
        total = torch.zeros(())
        for batch in mine:
            loss = objective(distill, tasks, batch, engine(batch), tiny.lessons(teacher, batch), rows)
            engine.backward(loss.total * (ranks * accumulation))
            engine.step()
            total += loss.total.detach()
        seen.append(distributed.summed(total).item())
    trained = {id(p) for group in engine.optimizer.param_groups for p in group["params"]}
    return {
        "losses": seen,
        "teacher": digest(teacher),
        "teacher in training": any(module.training for module in teacher.modules()),
        "teacher in optimizer": bool(trained & {id(p) for p in teacher.parameters()}),
        "teacher has gradients": any(p.grad is not None for p in teacher.parameters()),
    }


def digest(model: torch.nn.Module) -> str:
    """Of all weights of a model, in order."""
    data = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(data).hexdigest()


def contrast(sizes: list[int], captions: int) -> dict:
    """ITC's global loss and the gradients of its head's inputs and temperature, rows dealt by `sizes`."""
    ranks, rank = distributed.world_size(), distributed.rank()
    size, start = (sum(sizes), 0) if ranks == 1 else (sizes[rank], sum(sizes[:rank]))
    task = tiny.PRETRAINING["itc"]
    batch = tiny.batch({"itc": task}, tiny.samples(size, start=start, captions=captions))
    draw = torch.Generator().manual_seed(5)
    everything = torch.randn(sum(sizes), 2, 16, generator=draw, dtype=torch.float64)
    torch.manual_seed(0)
    head = ContrastHead(16, 16, HeadSpec("contrast", 8)).double()
    target = batch.targets["itc"]
    mine = everything[start : start + size].clone().requires_grad_()
    rows = torch.arange(size)[:, None].expand(size, 2)
    logits = head(Features(torch.zeros(0), torch.zeros(0), mine[:, 0], mine[:, 1]), rows)
    loss = task.hard_loss(logits, target).sum() / sum(sizes)
    loss.backward()
    weights = [distributed.summed(parameter.grad).flatten().tolist() for parameter in head.parameters()]
    return {"loss": distributed.summed(loss.detach()).item(), "inputs": mine.grad.tolist(), "weights": weights}


def scores(count: int, micro_batch: int) -> dict:
    """The scores of a model over `count` samples, dealt to the ranks in shares that are as uneven as they can be."""
    ranks, rank = distributed.world_size(), distributed.rank()
    tasks = {**tiny.PRETRAINING, **tiny.FINETUNING, "itm": tiny.TASKS["itm"](block=1)}
    student = tiny.model(tiny.model_config(num_slots=2), tasks)
    step = micro_batch * ranks
    batches = []
    for begin in range(0, count, step):
        mine = range(begin + rank * micro_batch, min(begin + (rank + 1) * micro_batch, count, begin + step))
        dealt = [sample for position in mine for sample in tiny.samples(1, start=position, paired=True)]
        batches.append(Loaded(tiny.batch(tasks, dealt), ()))
    judged = {name: tasks[name] for name in ("mlm", "nlvr2", "snli_ve")}
    return evaluate(student, judged, batches, CPU).as_json()


def stop_flag(folder: str, told: int | None) -> list[bool]:
    """Whether each rank hears of a stop request that only rank `told` got by a signal (or a file, if None)."""
    stop = StopRequest()
    stop.look_for(Path(folder) / "STOP", 0)
    (before,) = distributed.on_any_rank(bool(stop.reason()))
    if told is None and distributed.rank() == 0:
        (Path(folder) / "STOP").touch()
    distributed.barrier()
    if told == distributed.rank():
        os.kill(os.getpid(), signal.SIGUSR2)
    (after,) = distributed.on_any_rank(bool(stop.reason()))
    stop.close()
    return [before, after]


def run(recipe: str, overrides: list[str], stop_at: int | None = None) -> dict:
    """Train a recipe in these ranks; returns the exit code, or the user's mistake.

    With `stop_at` the stop file appears once the run has logged that step.
    """
    stop = StopRequest()
    try:
        config = load(recipe, overrides)
        if stop_at is not None and distributed.rank() == 0:
            threading.Thread(target=_stop_later, args=(Path(config.runs) / config.name, stop_at), daemon=True).start()
        return {"code": train(config, CPU, stop)}
    except (UserError, Unhealthy) as error:
        return {"mistake": str(error)}
    finally:
        stop.close()


def patience(recipe: str, minutes: float) -> list[float]:
    """Minutes that each group of a run waits, those of DeepSpeed's making included, with `minutes` as their limit."""
    config = load(recipe, [])
    with contextlib.redirect_stdout(io.StringIO()):
        build_engine(tiny.model(tiny.model_config(), tiny.PRETRAINING), config, distributed.world_size())
    wait_at_most(timedelta(minutes=minutes))
    found = [group._get_backend(CPU).options._timeout / timedelta(minutes=1) for group in c10d._world.pg_map]
    wait_at_most(PATIENCE)  # these ranks go on with other checks
    return found


def unhealthy(
    recipe: str, overrides: list[str], folder: str, spoiled: dict[str, list[int]], ranks: list[int], scale: float = 0
) -> dict:
    """Steps with a batch that some ranks cannot learn from: which were made, and what is told of the others.

    `spoiled` says by kind in which steps: pictures that are no numbers, or a loss a thousand times the usual. `scale`
    is what DeepSpeed's dynamic loss scale begins with, at a floor of 1; without it, there is none.
    """
    config = load(recipe, overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(tiny.model(tiny.model_config(), tiny.PRETRAINING), config, distributed.world_size())
    if scale:  # fp16 needs a GPU, its scaler does not
        engine.optimizer.loss_scaler = DynamicLossScaler(
            scale, scale_window=1000, min_scale=1.0, delayed_shift=1, consecutive_hysteresis=False, dtype=torch.float32
        )
    run = Path(folder)
    health = Health(config.health, Steps(engine), run)
    health.begin(Position())
    made, changed, hopeless, scales = [], [], [], []
    for step in range(1, config.steps + 1):
        batch = tiny.batch(tiny.PRETRAINING, tiny.samples(4, start=4 * step + 100 * distributed.rank()))
        mine = distributed.rank() in ranks
        if mine and step in spoiled.get("pictures", ()):
            batch = batch._replace(images=torch.full_like(batch.images, torch.nan))
        rows = distributed.summed(row_weights([batch], tiny.PRETRAINING))
        loss = objective(DistillConfig(targets="none", soft=0.0), tiny.PRETRAINING, batch, engine(batch), (), rows)
        if mine and step in spoiled.get("loss", ()):
            loss = loss._replace(total=1000 * loss.total)
        before = {id(flat): state["exp_avg"].clone() for flat, state in engine.optimizer.optimizer.state.items()}
        engine.backward(health.watched(loss, last=True) * distributed.world_size())
        engine.step()
        after = engine.optimizer.optimizer.state
        moments = [(before.get(id(flat)), state["exp_avg"]) for flat, state in after.items()]
        changed.append(any(then is None or not torch.equal(then, now) for then, now in moments))
        made.append(health.look(step))
        hopeless.append(health.hopeless)
        scales.append(float(engine.optimizer.loss_scale))
    distributed.barrier()  # rank 0 writes
    told = [event.details["what"] for event in read_events(run) if event.kind == "skipped"]
    finite = all(bool(parameter.isfinite().all()) for parameter in engine.module.parameters())
    return {"made": made, "changed": changed, "hopeless": hopeless, "told": told, "finite": finite, "scales": scales}


def _stop_later(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        time.sleep(0.005)
    (folder / "STOP").touch()


def interval() -> dict:
    """What two steps tell whose losses, waits and readings are those of the rank; rank 1 was slow, and had no pair."""
    rank = distributed.rank()
    found = Interval(CPU, 8, 10)
    for step in range(2):
        found.fetch(iter([Loaded(tiny.batch(tiny.PRETRAINING, tiny.samples(4)), ())]), 1)
        with found.phase("student"):
            time.sleep(0.02 * rank)
        found.add(torch.tensor(1.0 + rank + step), {"hard/itm": torch.tensor(0.5)})
    readings = {"attention/entropy/t2i": torch.tensor([4.0, 2.0]) * (1 - rank)}
    return found.read(2, torch.tensor(0.25), readings)


class DataParallel(NamedTuple):
    """How DeepSpeed is told of another number of ranks than there are."""

    ranks: int

    def get_data_parallel_world_size(self) -> int:
        return self.ranks


def parsed(recipe: str, overrides: list[str], ranks: int) -> dict:
    """What DeepSpeed itself reads in the configuration for so many ranks."""
    read = DeepSpeedConfig(ds_config(load(recipe, overrides), ranks), mpu=DataParallel(ranks))
    return {
        "global": read.train_batch_size,
        "accumulation": read.gradient_accumulation_steps,
        "micro": read.train_micro_batch_size_per_gpu,
        "clip": read.gradient_clipping,
    }


def rates(recipe: str, overrides: list[str]) -> list:
    """The rates told at the beginning of some steps, and those of all groups."""
    config = load(recipe, overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(tiny.model(tiny.model_config(), tiny.PRETRAINING), config, distributed.world_size())
    seen = []
    for step in range(4):
        seen.append([learning_rates(engine), [group["lr"] for group in engine.optimizer.param_groups]])
        logits = engine(tiny.batch(tiny.PRETRAINING, tiny.samples(4, start=4 * step))).logits
        engine.backward(sum(values.sum() for values in logits.values()))
        engine.step()
    return seen


def held(recipe: str, overrides: list[str]) -> dict:
    """How many parameters a model has, and what this rank holds of them after a step, in bytes (gradients before)."""
    config = load(recipe, overrides)
    model = tiny.model(tiny.model_config(), tiny.PRETRAINING)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(model, config, distributed.world_size())
    logits = engine(tiny.batch(tiny.PRETRAINING, tiny.samples(4))).logits
    engine.backward(sum(values.sum() for values in logits.values()))
    zero = engine.optimizer
    if config.deepspeed.startswith("zero3"):
        parameters = [parameter.ds_tensor for parameter in parameters]
        own, gradients = zero.fp32_partitioned_groups_flat, [zero.grad_partitions_flat_buffer]
    else:
        own, gradients = zero.single_partition_of_fp32_groups, [*chain(*zero.averaged_gradients.values())]
    bytes_of_gradients = storage_bytes(gradients)
    engine.step()
    moments = [value for state in zero.optimizer.state.values() for value in state.values() if value.ndim]
    return {
        "parameters": count,
        "weights": storage_bytes(parameters),
        "gradients": bytes_of_gradients,
        "optimizer": storage_bytes([*own, *moments]),
    }


def storage_bytes(tensors: list) -> int:
    """Of the distinct memory behind some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def life(
    recipe: str,
    overrides: list[str],
    steps: int,
    load_from: str | None = None,
    save_to: str | None = None,
    recut: bool = False,
    seed: int = 0,
) -> dict:
    """Some steps of a model with frozen, tied and uncounted parts: losses, and what the engine holds by name.

    It begins with the checkpoint `load_from`, if any, and leaves `save_to`. With `recut` shards are put together anew
    whatever the number of ranks.
    """
    config = load(recipe, overrides)
    ranks, rank = distributed.world_size(), distributed.rank()
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(kept.Anchored(seed), config, ranks)
        if load_from and recut:
            load_recut(engine, SavedState(Path(load_from)))
        elif load_from:
            load_elastic(engine, Path(load_from))
    begun = kept.of_engine(engine) if load_from else {}
    seen = []
    for step in range(engine.global_steps, engine.global_steps + steps):
        size = 16 // ranks
        batch = tiny.batch(tiny.PRETRAINING, tiny.samples(size, start=16 * step + size * rank))
        rows = distributed.summed(row_weights([batch], tiny.PRETRAINING))
        loss = objective(DistillConfig(targets="none"), tiny.PRETRAINING, batch, engine(batch), (), rows)
        engine.backward(loss.total * ranks)
        engine.step()
        seen.append(distributed.summed(loss.total.detach()).item())
    ended = kept.of_engine(engine)
    if save_to:
        with contextlib.redirect_stdout(io.StringIO()):
            engine.save_checkpoint(str(Path(save_to).parent), tag=Path(save_to).name, save_latest=False)
        distributed.barrier()
    return {"begun": begun, "losses": seen, "ended": ended}


def refusal(recipe: str, overrides: list[str], load_from: str) -> str:
    """What a checkpoint is refused with."""
    with contextlib.redirect_stdout(io.StringIO()):
        engine = build_engine(kept.Anchored(0), load(recipe, overrides), distributed.world_size())
    try:
        load_elastic(engine, Path(load_from))
    except UserError as error:
        return str(error)
    return ""


def apart(folders: list[str], patience: float) -> list[list[str]]:
    """What the doctor says where a folder of one name is another on each rank."""
    before = os.getcwd()
    os.chdir(folders[distributed.rank()])
    try:
        case = Case(None, None, 2, 2, Path("/proc/self/cwd"), (), CPU)
        return [[line.grade, line.said] for line in between.shared_folder(case, patience)]
    finally:
        os.chdir(before)


def operations(size: int) -> float:
    """Of training on a micro-batch, counted by one rank beside the others."""
    batch = tiny.batch(tiny.PRETRAINING, tiny.samples(size))
    return flops(tiny.card(tiny.model_config(), tiny.PRETRAINING), (), batch)


CHECKS = {
    "losses": losses, "contrast": contrast, "scores": scores, "stop_flag": stop_flag, "run": run, "parsed": parsed,
    "rates": rates, "held": held, "unhealthy": unhealthy,
    "patience": patience, "life": life, "operations": operations, "refusal": refusal,
    "interval": interval, "apart": apart,
}  # fmt: skip
