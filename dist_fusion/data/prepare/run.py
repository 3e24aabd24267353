"""`dist-fusion prepare NAME SRC DST`: shards of a data set, in parallel, and to be continued after a kill.

DST has `plan.json` (whose shards these are), a folder a split with `00000.tar`, `00000.json`, …, then `skipped.jsonl`
(what was left out, and why) and, last, `prepare.json` (exact counts): its presence says all is there.
"""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, fields
from hashlib import file_digest
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from dist_fusion.data.prepare.plan import SPLITS, Options, Plan, Planned, Skip
from dist_fusion.data.prepare.shard import Job, Report, make_shard, replacing
from dist_fusion.data.prepare.table import PREPARE, DataSet, Installed
from dist_fusion.schema import UserError, nearest

PROBED = 200
"""Planned samples, from the beginning of each split, of whose images at least one must be there."""
AHEAD = 2
"""Jobs a worker that wait for it, so that a plan of millions is never in memory."""


class Survey(NamedTuple):
    """What a plan comes to, before any image is read."""

    sizes: dict[str, int]  # split -> samples planned
    skipped: list[Skip]


def prepare(name: str, folders: Sequence[Path], options: Options, workers: int) -> str:
    """Make the shards of a data set; returns what was made, as text.

    Raises:
        UserError: before anything is written, if the data set, a folder, an option or a file is wrong.
    """
    row = _row(name, folders, options)
    if isinstance(row, Installed):
        return f"{row.make(folders[0])}\n"
    source, target = folders
    plan = row.plan(source, options)
    survey = _survey(plan, options, source)
    _claim(target, _identity(name, source, plan, options, survey.sizes))
    summary = _make(name, source, target, plan, options, survey, workers)
    with replacing(target / "prepare.json") as file:
        file.write(f"{json.dumps(summary, indent=2)}\n".encode())
    return _as_text(summary, target)


def _row(name: str, folders: Sequence[Path], options: Options) -> DataSet | Installed:
    if name not in PREPARE:
        raise UserError(f"no data set {name!r}{nearest(name, PREPARE)}; it can be {', '.join(PREPARE)}")
    row = PREPARE[name]
    wanted = "DST" if isinstance(row, Installed) else "SRC DST"
    if len(folders) != len(wanted.split()):
        raise UserError(f"prepare {name} takes {wanted}; given were {len(folders)} folders")
    special = {option for other in PREPARE.values() if isinstance(other, DataSet) for option in other.options}
    known = (
        {*row.options, *({field.name for field in fields(Options)} - special)} if isinstance(row, DataSet) else set()
    )
    unknown = [option for option in options.changed() if option not in known]
    if unknown:
        raise UserError(f"prepare {name} does not know --{unknown[0].replace('_', '-')}")
    if isinstance(row, DataSet) and not folders[0].is_dir():
        raise UserError(f"SRC {folders[0]} is no folder; {name} needs there: {row.needs}")
    return row


def _survey(plan: Plan, options: Options, source: Path) -> Survey:
    """Goes through the whole plan once, so that what is wrong with it is told before the work."""
    samples, probed, skipped = Counter[str](), {split: list[Planned]() for split in SPLITS}, list[Skip]()
    for item in plan.items():
        if not options.wants(item.split):
            continue
        if isinstance(item, Skip):
            skipped.append(item)
        else:
            samples[item.split] += 1
            if len(probed[item.split]) < PROBED:
                probed[item.split].append(item)
    if not samples:
        raise UserError(f"{source} has no sample of {options.only or 'any split'}")
    for split, first in probed.items():
        places = [picture.places for planned in first for picture in planned.images]
        if places and not any((source / place).is_file() for of in places for place in of):
            raise UserError(
                f"none of the first {len(places)} images of {split} is under {source}; the first one was looked for at "
                f"{', '.join(places[0][:4])}"
            )
    return Survey({split: samples[split] for split in SPLITS if samples[split]}, skipped)


def _identity(name: str, source: Path, plan: Plan, options: Options, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What makes one prepare another: two of the same identity write the same bytes."""
    inputs = {}
    for path in plan.inputs:
        with path.open("rb") as file:
            place = path.relative_to(source) if path.is_relative_to(source) else path
            inputs[str(place)] = file_digest(file, "sha256").hexdigest()
    return {"name": name, "options": asdict(options), "planned": sizes, "inputs": inputs}


def _claim(target: Path, identity: Mapping[str, Any]) -> None:
    """Make DST this plan's; refuses a folder that is another's."""
    claim = target / "plan.json"
    if claim.is_file():
        theirs = json.loads(claim.read_text())
        differing = [key for key in identity if theirs.get(key) != identity[key]]
        if differing:
            (key, *_) = differing
            raise UserError(
                f"{target} holds the shards of another plan: its {key} is {_shown(theirs.get(key))}, asked is "
                f"{_shown(identity[key])}; choose another DST, or delete it"
            )
        return
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty and has no plan.json; choose another DST")
    target.mkdir(parents=True, exist_ok=True)
    with replacing(claim) as file:
        file.write(f"{json.dumps(identity, indent=2)}\n".encode())


def _make(
    name: str, source: Path, target: Path, plan: Plan, options: Options, survey: Survey, workers: int
) -> dict[str, Any]:
    """All shards, `skipped.jsonl` and the plan's files; returns what prepare.json says."""
    (target / "prepare.json").unlink(missing_ok=True)  # until all is there again
    for split in survey.sizes:
        (target / split).mkdir(exist_ok=True)
    counts: dict[str, dict[str, Counter[str]]] = {split: {} for split in survey.sizes}
    skipped, shards = list(survey.skipped), Counter[str]()
    with tqdm(total=sum(survey.sizes.values()), desc=name, unit=" samples", mininterval=1) as progress:
        for job, report in _in_order(make_shard, _jobs(plan, options, source, target), workers):
            split = job.path.parent.name
            shards[split] += report.size > 0
            for of, count in report.counts.items():
                counts[split].setdefault(of, Counter()).update(count)
            skipped += report.skipped
            progress.update(len(job.planned))
    for file_name, content in plan.files.items():
        with replacing(target / file_name) as file:
            file.write(content)
    with replacing(target / "skipped.jsonl") as file:
        file.writelines(f"{json.dumps(item._asdict())}\n".encode() for item in skipped)
    for leftover in target.rglob(".*.[0-9]*"):  # of runs that were killed
        leftover.unlink()
    return {
        "name": name,
        "counts": {split: {of: dict(count) for of, count in by.items()} for split, by in counts.items()},
        "shards": {split: shards[split] for split in survey.sizes},
        "skipped": dict(sorted(Counter(item.reason for item in skipped).items())),
        **plan.notes,
    }


def _jobs(plan: Plan, options: Options, source: Path, target: Path) -> Iterator[Job]:
    """The shards of the plan."""
    waiting: dict[str, list[Planned]] = {}
    made = Counter[str]()

    def job(split: str) -> Job:
        number = made[split]
        made[split] += 1
        path = target / split / f"{number:05d}"
        planned = tuple(waiting.pop(split))
        return Job(path, source, number * options.samples_per_shard, planned, options.short_side)

    for item in plan.items():
        if isinstance(item, Planned) and options.wants(item.split):
            waiting.setdefault(item.split, []).append(item)
            if len(waiting[item.split]) == options.samples_per_shard:
                yield job(item.split)
    for split in list(waiting):
        yield job(split)


def _in_order(make: Callable[[Job], Report], jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Report]]:
    """Each job with its report, in the order of the jobs, by `workers` processes (one: this one)."""
    jobs = iter(jobs)
    if workers == 1:
        for job in jobs:
            yield job, make(job)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, _follow_parent) as pool:
        running = deque[tuple[Job, Future[Report]]]()
        try:
            for job in islice(jobs, workers * AHEAD):
                running.append((job, pool.submit(make, job)))
            while running:
                job, future = running.popleft()
                report = future.result()
                running.extend((later, pool.submit(make, later)) for later in islice(jobs, 1))
                yield job, report
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when its parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 100 else f"{text[:100]} …"


def _as_text(summary: Mapping[str, Any], target: Path) -> str:
    lines = [f"{summary['name']} in {target}"]
    for split, by in summary["counts"].items():
        for of, count in by.items():
            told = ", ".join(f"{number:,} {kind}" for kind, number in count.items())
            lines.append(f"  {split:<8} {of}: {told} in {summary['shards'][split]} shards")
    lines += [f"  skipped  {number:,}: {reason}" for reason, number in summary["skipped"].items()]
    return "\n".join(lines) + "\n"
