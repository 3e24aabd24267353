"""Tars of samples: `<key>.{jpg,png,webp}` (two images: `<key>.left.jpg`, `<key>.right.jpg`) and `<key>.json`.

The JSON holds only the keys it has of: image_id, source, texts, questions [{id, question, answers {answer: score},
kind}], and statements [{id, text, label, group}].
img2dataset's tars are read as they are: their `<key>.txt` is one text. Only these members are looked at, so nothing
in a shard can run code: a pickle is passed over, and a path must be a plain local file, never a `pipe:` or an address.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import webdataset as wds

from dist_fusion.data.images import EXTENSIONS
from dist_fusion.schema import UserError


class Record(NamedTuple):
    """One sample of a shard, its images still encoded."""

    key: str
    images: tuple[bytes, ...]
    image_ids: tuple[str, ...]
    texts: tuple[str, ...]
    questions: tuple[Mapping[str, Any], ...]
    statements: tuple[Mapping[str, Any], ...]


def find_shards(folders: Sequence[str]) -> list[str]:
    """Every tar of `folders` (or the tars themselves) in the order of their names.

    They are absolute, since webdataset runs a relative `pipe:command`, also where that is a file's name.

    Raises:
        UserError: where there is no such folder, it has no tar, or a tar is empty or cut off.
    """
    shards: list[Path] = []
    for name in folders:
        if ":" in name.split("/")[0]:
            raise UserError(
                f"data.shards has {name!r}; a shard must be a local file: commands and addresses are not opened"
            )
        path = Path(name)
        found = [path] if path.is_file() else sorted(path.glob("*.tar"))
        if not found:
            reason = "has no .tar files" if path.is_dir() else "does not exist"
            raise UserError(f"data.shards has {name!r}, which {reason}; `dist-fusion prepare` makes shards")
        shards += found
    for shard in shards:
        if shard.stat().st_size == 0:
            raise UserError(f"the shard {shard} is empty; delete it or make it again")
        if _is_cut_off(shard):
            raise UserError(f"the shard {shard} is cut off; copy it or make it again")
    return [str(shard.absolute()) for shard in shards]


def write_shards(folder: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]], samples_per_shard: int) -> int:
    """Write (key, {extension: bytes}) to `00000.tar`, `00001.tar`, … of `folder`; returns how many samples."""
    folder.mkdir(parents=True, exist_ok=True)
    count, writer = 0, None
    for key, members in samples:
        if count % samples_per_shard == 0:
            if writer is not None:
                writer.close()
            writer = wds.TarWriter(str(folder / f"{count // samples_per_shard:05d}.tar"), encoder=False, mtime=0)
        assert writer is not None
        writer.write({"__key__": key, **members})
        count += 1
    if writer is not None:
        writer.close()
    return count


def read_records(shards: Sequence[str], *, order: str | None, buffer: int) -> Iterator[Record]:
    """The records of all shards once: as they lie if `order` is None, else shuffled by that seed alone.

    Shards are permuted, then samples mixed in a buffer. Raises UserError if a shard is not a whole tar.
    """
    names = list(shards)
    stages: list[Any] = [wds.tarfile_to_samples(select_files=_looked_at)]
    if order is not None:
        Random(f"{order}/shards").shuffle(names)
        stages.append(wds.shuffle(buffer, initial=buffer, rng=Random(f"{order}/samples")))
    try:
        for raw in wds.DataPipeline(wds.SimpleShardList(names), *stages):
            yield _record(raw)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"a shard of {Path(names[0]).parent} cannot be read: {error}") from error


def _is_cut_off(shard: Path) -> bool:
    """Whether a tar lacks the empty block that ends one; tarfile takes a cut between two members for the end."""
    with shard.open("rb") as file:
        head = file.read(512)
        size = file.seek(0, 2)
        file.seek(max(0, size - 512))
        return head[257:262] == b"ustar" and (size % 512 > 0 or any(file.read()))


def _check_question(question: Mapping[str, Any]) -> None:
    """Refuse a question that could not be asked later, in the middle of training, on one rank alone."""
    well = isinstance(question["question"], str) and isinstance(question["answers"], dict) and "id" in question
    if not well or not all(isinstance(score, int | float) for score in question["answers"].values()):
        raise ValueError('a question must be {"id", "question": text, "answers": {answer: score}}')


def _check_statement(statement: Mapping[str, Any]) -> None:
    """Refuse a statement that could not be judged later; a label must be a string, since bool("False") is true."""
    well = isinstance(statement, dict) and statement.keys() >= {"id", "text", "label"}
    if not well or not all(isinstance(statement.get(key, ""), str) for key in ("text", "label", "group")):
        raise ValueError('a statement must be {"id", "text": text, "label": text} and may have "group": text')


def _looked_at(name: str) -> bool:
    return name.rsplit(".", 1)[-1].lower() in (*EXTENSIONS, "json", "txt")


def _record(raw: Mapping[str, Any]) -> Record:
    key = f"{raw['__url__']}/{raw['__key__']}"
    try:
        tree = json.loads(raw.get("json", b"{}"))
        texts = tree.get("texts") or [raw.get("txt", b"").decode()]
        questions, statements = (tree.get(key) or [] for key in ("questions", "statements"))
        if not all(isinstance(given, list) for given in (texts, questions, statements)):
            raise ValueError("texts, questions and statements must be lists")
        texts = [text for text in texts if text.strip()]
        for question in questions:
            _check_question(question)
        for statement in statements:
            _check_statement(statement)
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"sample {key} has an unreadable .json or .txt: {error}") from None
    images = [raw[name] for name in sorted(raw) if name.rsplit(".", 1)[-1] in EXTENSIONS]
    shard = Path(raw["__url__"])
    place = f"{shard.parent.name}/{shard.name}/{raw['__key__']}"  # img2dataset's keys repeat from set to set
    name = str(tree.get("image_id") or tree.get("url") or place)
    return Record(
        key=key,
        images=tuple(images),
        image_ids=(name,) if len(images) < 2 else tuple(f"{name}/{i}" for i in range(len(images))),
        texts=tuple(texts),
        questions=tuple(questions),
        statements=tuple(statements),
    )
