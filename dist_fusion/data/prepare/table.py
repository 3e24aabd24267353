"""Which data sets there are, and what each needs."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dist_fusion.data.prepare import (
    coco,
    easy_forms,
    easy_vqa,
    flickr30k,
    folder,
    nlvr,
    nlvr2,
    snli_ve,
    vg,
    video,
    vqav2,
    web,
)
from dist_fusion.data.prepare.plan import Options, Plan


class DataSet(NamedTuple):
    """How the samples of a data set are found under SRC."""

    plan: Callable[[Path, Options], Plan]
    needs: str  # what SRC must hold
    options: tuple[str, ...] = ()  # those of `Options` that only some sets know


class Installed(NamedTuple):
    """A data set that comes with the installation and needs no SRC."""

    make: Callable[[Path], object]
    about: str


PREPARE: dict[str, DataSet | Installed] = {
    "coco": DataSet(
        coco.plan, "dataset_coco.json (Karpathy) or captions_*.json; train2014/ val2014/ (or 2017's)", ("splits",)
    ),
    "vg": DataSet(
        vg.plan, "region_descriptions.json, image_data.json, dataset_coco.json; VG_100K/ VG_100K_2/", ("held_out",)
    ),
    "cc3m": DataSet(web.plan_cc3m, "Train_GCC-*.tsv, Validation_GCC-*.tsv; images_train/ images_val/", ("named",)),
    "sbu": DataSet(web.plan_sbu, "sbu-captions-all.json or SBU_captioned_photo_dataset_*.txt; images/", ("named",)),
    "vqav2": DataSet(
        vqav2.plan, "v2_OpenEnded_*_questions.json, v2_mscoco_*_annotations.json; train2014/ val2014/", ("answers",)
    ),
    "nlvr2": DataSet(nlvr2.plan, "data/{train,dev,test1}.json; images/train/ dev/ test1/"),
    "snli-ve": DataSet(snli_ve.plan, "snli_ve_{train,dev,test}.jsonl; flickr30k-images/"),
    "flickr30k": DataSet(flickr30k.plan, "dataset_flickr30k.json (Karpathy); flickr30k-images/"),
    "nlvr": DataSet(nlvr.plan, "{train,dev,test}/*.json and their images/ (the first NLVR)", ("images",)),
    "folder": DataSet(folder.plan, "your images and captions.csv, .tsv or .jsonl", ("image_column", "text_column")),
    "video": DataSet(video.plan, "your videos, captions beside each in .txt or .json", ("frames",)),
    "easy-vqa": Installed(easy_vqa.prepare, "coloured shapes with questions: the demo's"),
    "easy-nlvr2": Installed(easy_forms.prepare_nlvr2, "their facts in the form of NLVR2"),
    "easy-snli-ve": Installed(easy_forms.prepare_snli_ve, "their facts in the form of SNLI-VE"),
}
"""Data sets by name."""


def listing() -> str:
    """One line a data set: its name and what SRC must hold."""
    lines = []
    for name, row in PREPARE.items():
        about = f"SRC: {row.needs}" if isinstance(row, DataSet) else f"no SRC: {row.about}"
        lines.append(f"  {name:<13} {about}")
    return "\n".join(lines)
