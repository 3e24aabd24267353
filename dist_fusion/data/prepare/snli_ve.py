"""SNLI-VE (arXiv:1901.06706): hypotheses about Flickr30k's images.

Labels are kept as words, since every source numbers them otherwise; a number is refused. The premise in words
(`sentence1`, a caption of the image) is left out: it would give the image away.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dist_fusion.data.prepare import flickr30k
from dist_fusion.data.prepare.plan import EMPTY, UNLABELLED, Options, Plan, Planned, Skip, record_of
from dist_fusion.data.prepare.sources import find, read_lines
from dist_fusion.schema import UserError

LABELS = ("contradiction", "entailment", "neutral")
NO_GOLD = "-"  # SNLI's annotators did not agree
SPLITS = ("train", "dev", "test")
IMAGE_KEYS = ("Flickr30K_ID", "Flikr30kID", "captionID")  # SNLI-VE has shipped with both spellings
FORM = "SNLI-VE's snli_ve_*.jsonl"


def plan(source: Path, options: Options) -> Plan:
    """One sample an image with all hypotheses about it."""
    paths = {
        split: find(
            source, (f"snli_ve_{split}.jsonl", f"annotations/snli_ve_{split}.jsonl"), "SNLI-VE (and its images with "
            "Flickr30k); --only names the splits to make"
        )
        for split in SPLITS if options.wants(split)
    }  # fmt: skip

    def items() -> Iterator[Planned | Skip]:
        for split, path in paths.items():
            statements = defaultdict(list)
            for number, row in read_lines(path, FORM):
                where = f"{path}, line {number}"
                image = _image_of(row, where)
                if any(key not in row for key in ("gold_label", "sentence2", "pairID")):
                    raise UserError(
                        f"{where} is not in the form of {FORM}: it must have gold_label, sentence2 and pairID"
                    )
                text = " ".join(row["sentence2"].split())
                if row["gold_label"] == NO_GOLD or not text:
                    yield Skip(split, EMPTY if not text else UNLABELLED, row["pairID"])
                    continue
                label = _label_of(row, where)
                statements[image].append({"id": row["pairID"], "text": text, "label": label})
            for image, told in statements.items():
                record = record_of(f"flickr30k/{image}", "snli-ve", statements=told)
                yield Planned(split, (flickr30k.picture(f"{image}.jpg"),), record)

    return Plan(items, tuple(paths.values()))


def _label_of(row: Mapping[str, Any], where: str) -> str:
    label = row["gold_label"]
    if label not in LABELS:
        raise UserError(
            f"{where} has the gold_label {label!r}; it must be one of the words {', '.join(LABELS)} or "
            f"{NO_GOLD!r} (numbers mean other things in every source)"
        )
    return str(label)


def _image_of(row: Mapping[str, Any], where: str) -> str:
    """`3416050480` of "3416050480", "3416050480.jpg" or "3416050480.jpg#4"."""
    for key in IMAGE_KEYS:
        if row.get(key):
            return str(row[key]).split("#")[0].removesuffix(".jpg")
    raise UserError(f"{where} names no image; it must have one of {', '.join(IMAGE_KEYS)}")
