"""One optimizer step of pre-training beside the same work composed of transformers' parts.

A step is: batch to the device, teacher, student, all losses of the recipe `pretrain` (masked words, matching and
contrast, soft labels for the first two, attention at four sites), backward, clipped norm, AdamW. Both sides have plain
fused AdamW (no DeepSpeed) and the recipe's dropout, and neither loads data.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from dist_fusion.bench import composed, hugging_face, pretraining
from dist_fusion.bench.captions import VOCABULARY
from dist_fusion.bench.composed import Composed
from dist_fusion.bench.pretraining import Pretraining
from dist_fusion.bench.timing import Contest, Row, compare
from dist_fusion.facts import flop_counter, kept_bytes, kept_for_backward

TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
"""How far apart the sides' losses may be, as a share; the teachers' norms have other epsilons (1e-6 and 1e-12)."""


@dataclass(frozen=True)
class Case:
    """How each side runs."""

    name: str
    dtype: torch.dtype  # of both students
    our_teacher: torch.dtype
    their_teacher: torch.dtype
    as_published: bool = False


HALF = torch.float16
CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case("like for like, fp32", torch.float32, torch.float32, torch.float32),
        Case("as published, fp32", torch.float32, torch.float32, torch.float32, as_published=True),
        Case("like for like, bf16", torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ),
    "cuda": (
        Case("like for like, fp16", HALF, HALF, HALF),
        Case("as published, fp16, its teacher fp32", HALF, HALF, torch.float32, as_published=True),
    ),
}
"""By kind of device. Half precision is of weights and activations, over fp32 copies in the optimizer, on both sides.
"Like for like" is the same precision and padding, and SDPA wherever no map is read. "As published" is ViLT's,
BridgeTower's and DiDE's way: texts padded to all positions, attention written out in every layer, all maps of the
teacher kept, and the word heads over every token."""


@dataclass(frozen=True)
class Size:
    """How large the comparison is."""

    samples: int
    overrides: tuple[str, ...]  # of the recipe
    seconds: float  # a case


FULL = {"cpu": Size(8, (), seconds=30), "cuda": Size(64, (), seconds=20)}
QUICK = Size(
    4,
    ("model.width=32", "model.num_heads=2", "model.num_layers=2", "model.num_fusion_layers=2", "model.image_size=64"),
    0,
)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """One row a case, each after a check that both sides have the same losses."""
    size = QUICK if quick else FULL[device.type]
    for case in CASES[device.type]:
        ours, theirs = build_pair(case, size, device)
        check_agreement(ours, theirs, TOLERANCE[case.dtype])
        yield compare(_contest(case, size, ours, theirs), device, size.seconds)


def build_pair(case: Case, size: Size, device: torch.device) -> tuple[Pretraining, Composed]:
    """Both sides with the same random weights."""
    torch.manual_seed(0)
    config = pretraining.recipe(size.samples, size.overrides)
    encoder = replace(config.model, kind="fusion-encoder")
    specs = pretraining.heads(config)
    teacher, peer = hugging_face.build_pair(
        encoder, {task: specs[task] for task in config.soft_tasks(config.teachers[0])}, VOCABULARY.size
    )
    ours = pretraining.build(config, teacher, case.dtype, case.our_teacher, device)
    batch = pretraining.lay(config, config.model.max_text_length) if case.as_published else ours.batch
    theirs = composed.build(
        config,
        ours.student,
        peer.to(device, case.their_teacher),
        batch,
        attention="eager" if case.as_published else "sdpa",
        every_word=case.as_published,
        device=device,
    )
    return ours, theirs


def check_agreement(ours: Pretraining, theirs: Composed, tolerance: float) -> None:
    """Raises AssertionError if any term of the losses differs by more than this share, without dropout."""
    for student in (ours.student, theirs.student):
        student.eval()
    with torch.no_grad():
        said, heard = ours.loss().terms, theirs.loss()
    for student in (ours.student, theirs.student):
        student.train()
    assert said.keys() == heard.keys(), (said.keys(), heard.keys())
    for name, term in said.items():
        torch.testing.assert_close(heard[name].float(), term.float(), rtol=tolerance, atol=tolerance / 100)


def _contest(case: Case, size: Size, ours: Pretraining, theirs: Composed) -> Contest:
    batch = ours.batch
    return Contest(
        case=case.name,
        sizes={
            "samples": size.samples,
            "layers": ours.config.model.num_layers,
            "width": ours.config.model.width,
            "image": ours.config.model.image_size,
            "dtype": str(case.dtype),
            "ours": {
                "teacher": str(case.our_teacher),
                "images": len(batch.images),
                "texts": len(batch.text_ids),
                "pairs": len(batch.pairs),
                "text_tokens": batch.text_ids.shape[1],
                **_counted(lambda: ours.loss().total, ours.student),
            },
            "peer": {
                "teacher": str(case.their_teacher),
                "pairs": sum(len(one.images) for one in theirs.passes.values()),
                "text_tokens": theirs.passes["itm"].text_ids.shape[1],
                **_counted(lambda: torch.stack([*theirs.loss().values()]).sum(), theirs.student),
            },
        },
        ours=ours.step,
        peer=f"composed of transformers {transformers.__version__}",
        theirs=theirs.step,
    )


def _counted(loss: Callable[[], torch.Tensor], student: nn.Module) -> dict[str, Any]:
    """What one forward and backward costs."""
    with flop_counter() as counts, kept_for_backward() as kept:
        loss().backward()
    student.zero_grad()
    return {
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "multiply_adds": counts.get_total_flops() // 2,
        "kept_for_backward_mb": round(kept_bytes(kept, student) / 1e6, 1),
    }
