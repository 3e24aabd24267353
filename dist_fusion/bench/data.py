"""The data's way in: planning an epoch of the paper's size, starting anywhere, and samples a second.

The plan is of 4.1 million images with 9.85 million texts in 410 shards, which are files without data, with true
indices. Samples a second are compared with webdataset's own pipeline on the same shards, with the same decoding and
tokens, in one process without loader workers.
"""

import io
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from dist_fusion.batch import Supply
from dist_fusion.bench.timing import Contest, Row, compare, resident
from dist_fusion.data import index
from dist_fusion.data.images import decode
from dist_fusion.data.shards import find_shards, write_shards
from dist_fusion.data.stream import DataConfig, Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.tasks import TASKS

SHARDS, SAMPLES, SAMPLE_BYTES = 410, 10_000, 30_000
TEXTS = (2, 3)
"""Of an image, by turns about as often as gives 9.85 million."""
BATCH = 4096
RANKS = 64
PHOTOS = 256
SIZE = (480, 640)
CAPTION = "a dog runs along the beach at sunset with a ball"


class PlanRow(NamedTuple):
    """What it takes before the first micro-batch can be read."""

    case: str
    sizes: Mapping[str, object]
    seconds: float
    megabytes: float | None

    def line(self) -> str:
        """The row for people."""
        memory = f"   {self.megabytes:,.0f} MB" if self.megabytes is not None else ""
        return f"{self.case:<48} {self.seconds:8.2f} s{memory}"


def rows(device: torch.device, quick: bool) -> Iterator[PlanRow | Row]:
    """Plan, start, and read."""
    with tempfile.TemporaryDirectory() as folder:
        yield from planning(Path(folder), 4 if quick else SHARDS, 50 if quick else SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        yield reading(Path(folder), 8 if quick else PHOTOS, 0.0 if quick else 20.0)


def planning(folder: Path, shards: int, samples: int) -> Iterator[PlanRow]:
    """The plan of one rank of many, and a start in the middle of the second epoch."""
    for number in range(shards):
        hollow_shard(folder / f"{number:05d}.tar", samples)
    sizes = {"shards": shards, "images": shards * samples, "texts": sum(TEXTS) * shards * samples // 2, "ranks": RANKS}
    tasks = {"itc": TASKS["itc"]()}
    tokenizer = Tokenizer("bert-base-uncased", 40)
    before, began = resident("VmRSS"), time.perf_counter()
    config = DataConfig(shards=(str(folder),))
    stream = Stream(config, tasks, tokenizer, 224, Plan(BATCH // RANKS, 3, RANKS, 0))
    epoch = stream.order.epoch(0)
    epoch.window(0, 0)
    yield PlanRow("plan an epoch", sizes, time.perf_counter() - began, (resident("VmRSS") - before) / 1e3)
    began = time.perf_counter()
    step = int(1.5 * stream.num_samples / BATCH)
    loaded = next(iter(stream.starting_at(step)))  # its samples are zeros, so each is tried, told and replaced
    assert loaded.damages
    yield PlanRow(f"start at step {step:,}, all of whose windows are read", sizes, time.perf_counter() - began, None)


def hollow_shard(path: Path, samples: int) -> None:
    """A file of the size of so many samples, and the index it would have."""
    with path.open("wb") as file:
        file.truncate(samples * SAMPLE_BYTES)
    begin = np.arange(samples, dtype=np.int64) * SAMPLE_BYTES
    status = path.stat()
    with index.index_file(str(path)).open("wb") as file:
        np.savez(
            file,
            made=np.array([index.VERSION, status.st_size, status.st_mtime_ns]),
            keys=np.array([f"{number:09d}" for number in range(samples)]),
            begin=begin,
            end=begin + SAMPLE_BYTES,
            supply=np.arange(samples) % len(TEXTS),
            supplies=np.array(json.dumps([Supply(1, texts, 0, ()) for texts in TEXTS])),
            damages=np.array("[]"),
        )


def reading(folder: Path, photos: int, seconds: float) -> Row:
    """All samples of some shards of photographs, decoded, tokenized and batched."""
    write_shards(folder, photographs(photos), 64)
    names = find_shards([str(folder)])
    tokenizer = Tokenizer("bert-base-uncased", 40)
    batch = min(32, photos)
    stream = Stream(
        DataConfig(shards=(str(folder),)), {"itc": TASKS["itc"]()}, tokenizer, 224, Plan(batch, 0, 1, 0)
    )  # fmt: skip

    def theirs() -> int:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(names), wds.tarfile_to_samples(), wds.shuffle(1000, initial=1000),
            wds.map(lambda raw: (decode(raw["jpg"], 224), tokenizer(json.loads(raw["json"])["texts"][0]).ids)),
            wds.batched(batch, collation_fn=lambda parts: (torch.stack([p for p, _ in parts]), [t for _, t in parts])),
        )  # fmt: skip
        return sum(len(images) for images, _ in pipeline)

    def ours() -> int:
        return sum(len(one.batch.images) for one in islice(iter(stream), photos // batch))

    assert theirs() == ours() == photos
    return compare(
        Contest(
            case=f"{photos} photographs, decoded and tokenized",
            sizes={"photographs": photos, "pixels": SIZE, "size": 224, "batch": batch},
            ours=ours,
            peer=f"webdataset {wds.__version__}",
            theirs=theirs,
        ),
        torch.device("cpu"),
        seconds,
    )


def photographs(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """JPEGs as large as COCO's, of smooth noise, each with a caption."""
    draw = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(draw.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=92)
        texts = [f"{CAPTION}, number {number}"]
        yield f"{number:06d}", {"jpg": buffer.getvalue(), "json": json.dumps({"texts": texts}).encode()}
