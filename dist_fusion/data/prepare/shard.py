"""One shard: a pure function of its planned samples and their images, whoever writes it and whenever.

`00000.tar` is written under another name, flushed to the disk and renamed; then `00000.json`, which says what is in it.
So a tar without its JSON is not finished, and a finished one is known by the digest of its plan and of its bytes.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dist_fusion.data.images import UnreadableImage, extension
from dist_fusion.data.prepare.pictures import read_frames, read_picture
from dist_fusion.data.prepare.plan import MISSING, UNDECODABLE, Planned, Skip
from dist_fusion.data.video import UnreadableVideo

PLACES = {1: ("",), 2: ("left.", "right."), 3: ("left.", "middle.", "right.")}
"""How the images of a sample are told apart, in the order of their names, by how many they are."""
COUNTED = ("texts", "questions", "statements")


class Job(NamedTuple):
    """A shard to write: `path` without its extension, the samples, and the number of the first in its split."""

    path: Path
    source: Path
    first: int
    planned: tuple[Planned, ...]
    short_side: int


class Report(NamedTuple):
    """What a shard holds."""

    plan: str  # digest of the job
    size: int  # bytes of the tar; 0 if no sample was left and there is no tar
    sha256: str
    counts: dict[str, dict[str, int]]  # source -> samples, texts, questions, statements
    skipped: list[Skip]


def make_shard(job: Job) -> Report:
    """Write a shard, or see that it is finished."""
    plan = sha256(json.dumps([job.first, job.short_side, job.planned]).encode()).hexdigest()
    tar, told = job.path.with_suffix(".tar"), job.path.with_suffix(".json")
    report = _finished(job, plan)
    if report is None:
        report = _write(job, plan, tar)
        with replacing(told) as file:
            file.write(json.dumps(report._asdict()).encode())
    return report


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that comes to `path` when it is whole, even if the machine stops."""
    # A killed run's last worker may still be at it: another process, another name.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def _finished(job: Job, plan: str) -> Report | None:
    """The report of a shard that is whole, of this plan, and lacks no image that has come since; else None."""
    tar, told = job.path.with_suffix(".tar"), job.path.with_suffix(".json")
    if not told.is_file():
        return None
    tree = json.loads(told.read_text())  # renamed into place when it was whole
    report = Report(**{**tree, "skipped": [Skip(*skip) for skip in tree["skipped"]]})
    if report.plan != plan or _missing(job) < sum(skip.reason == MISSING for skip in report.skipped):
        return None
    if report.size == 0:
        return None if tar.is_file() else report
    if not tar.is_file() or tar.stat().st_size != report.size:
        return None
    return report if _digest(tar) == report.sha256 else None


def _write(job: Job, plan: str, tar: Path) -> Report:
    counts: dict[str, Counter[str]] = {}
    skipped: list[Skip] = []
    with replacing(tar) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as members:
        for number, planned in enumerate(job.planned, job.first):
            for key, images, record in _samples(job, f"{number:09d}", planned, skipped):
                for name, content in [*images.items(), ("json", json.dumps(record).encode())]:
                    member = tarfile.TarInfo(f"{key}.{name}")  # no time, no owner: the same bytes everywhere
                    member.size = len(content)
                    members.addfile(member, io.BytesIO(content))
                count = counts.setdefault(record["source"], Counter())
                count["samples"] += 1
                count.update({kind: len(record[kind]) for kind in COUNTED if kind in record})
    size, digest = tar.stat().st_size, _digest(tar)
    if not counts:
        tar.unlink()  # a reader would look for samples in vain
        size = 0
    return Report(plan, size, digest, {source: dict(count) for source, count in counts.items()}, skipped)


def _samples(
    job: Job, key: str, planned: Planned, skipped: list[Skip]
) -> Iterator[tuple[str, dict[str, bytes], dict[str, Any]]]:
    """The samples of one that was planned: none if an image is missing or broken, many of a video."""
    record = dict(planned.record)
    try:
        if planned.frames:
            (video,) = planned.images
            frames = list(read_frames(job.source, video, planned.frames, job.short_side))  # all, or none if it breaks
            for number, image in enumerate(frames):
                yield f"{key}-{number:04d}", {"jpg": image}, {**record, "image_id": f"{record['image_id']}#{number}"}
        else:
            images = [read_picture(job.source, picture, job.short_side) for picture in planned.images]
            places = zip(PLACES[len(images)], images, strict=True)
            yield key, {f"{place}{extension(image)}": image for place, image in places}, record
    except FileNotFoundError as error:
        skipped.append(Skip(planned.split, MISSING, f"{record['image_id']}: {error}"))
    except (UnreadableImage, UnreadableVideo) as error:
        skipped.append(Skip(planned.split, UNDECODABLE, f"{record['image_id']}: {error}"))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _missing(job: Job) -> int:
    """How many samples lack an image."""
    return sum(
        not all(any((job.source / place).is_file() for place in picture.places) for picture in planned.images)
        for planned in job.planned
    )
