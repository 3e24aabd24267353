"""Frozen models that teach. A new kind of teacher is one function here and one line in TEACHERS.

What a teacher says leaves as a `Lesson`: an Output that autograd may keep, with how much it weighs and where.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
from torch import nn

from dist_fusion.models.initial import adapted, require_same_vocabulary
from dist_fusion.models.sources import Source, read_source
from dist_fusion.models.weights import ModelCard, build_model
from dist_fusion.schema import UserError, one_of, section
from dist_fusion.types import Batch, HeadSpec, Output

PRECISIONS: dict[str, torch.dtype | None] = {
    "auto": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What a teacher computes in; `auto` is fp16 on a GPU and fp32 elsewhere."""


class Teacher(NamedTuple):
    """A frozen model, and what it is heard on."""

    model: nn.Module
    weight: float
    soft: frozenset[str]  # tasks whose soft labels it gives
    head_map: tuple[int, ...] | None  # for each student head its head


class Lesson(NamedTuple):
    """What a teacher says of one batch."""

    output: Output
    weight: float
    soft: frozenset[str]
    head_map: tuple[int, ...] | None


def load_vilt(source: Source, student: ModelCard, soft: Sequence[str], wanted_by: str) -> nn.Module:
    """A ViLT with the student's image size and the heads of `soft` only.

    Raises:
        UserError: if it is no fusion encoder, or reads other tokens or patches than the student, whose attention could
            then not be matched.
    """
    require_same_vocabulary(source, student.vocabulary, wanted_by)
    if source.kind != "fusion-encoder":
        raise UserError(f"{wanted_by} {source.name!r} is a {source.kind}; a teacher must be a fusion-encoder")
    ours, theirs = student.config.patch_size, source.config.patch_size
    if ours != theirs:
        raise UserError(f"the teacher {source.name!r} has patch_size {theirs} and the student {ours}; they must agree")
    config = replace(
        source.config,
        image_size=student.config.image_size,
        max_text_length=student.config.max_text_length,
        num_slots=student.config.num_slots,
    )
    with torch.device("meta"):
        teacher = build_model(ModelCard(config, {task: source.heads[task] for task in soft}, student.vocabulary))
    weights = adapted(source.weights, config)
    names = teacher.state_dict()
    unlike = [name for name, tensor in names.items() if name not in weights or weights[name].shape != tensor.shape]
    if unlike:
        raise UserError(f"{wanted_by} {source.name!r} is not of ViLT's architecture: it lacks {', '.join(unlike[:6])}")
    teacher.load_state_dict({name: weights[name] for name in names}, assign=True)
    return teacher


TEACHERS: dict[str, Callable[[Source, ModelCard, Sequence[str], str], nn.Module]] = {"vilt": load_vilt}


@section
@dataclass(frozen=True)
class TeacherConfig:
    """One teacher. With several, every term is their mean by `weight`."""

    source: str  # a finished run, a Hugging Face folder or id, or a file of ViLT's authors
    kind: Annotated[str, one_of(TEACHERS)] = "vilt"
    weight: float = 1.0  # beside other teachers
    tasks: tuple[str, ...] | None = None  # whose soft labels it gives; all of the recipe's that have some if null
    head_map: tuple[int, ...] | None = None  # for each student head its head; one to one if null
    answers: str = ""  # file of its answers in their order, where its source does not tell them
    precision: Annotated[str, one_of(PRECISIONS)] = "auto"


def build_teacher(
    config: TeacherConfig, student: ModelCard, soft: Sequence[str], answers: str, device: torch.device, wanted_by: str
) -> Teacher:
    """The teacher of `config`, frozen, in eval mode and in its precision on `device`.

    `soft` are the tasks whose soft labels it must give, `answers` the meaning of its answers where its file has none.

    Raises:
        UserError: for whatever cannot teach this student; no head is ever made up.
    """
    source = read_source(config.source, f"{wanted_by}.source")
    require_heads(source, student.heads, soft, answers, wanted_by)
    ours, theirs = student.config.num_heads, source.config.num_heads
    if config.head_map is None and ours != theirs:
        raise UserError(
            f"the teacher {config.source!r} has {theirs} attention heads and the student {ours}; set "
            f"{wanted_by}.head_map to {ours} numbers, for each student head the teacher's from 0 to {theirs - 1}, or "
            "model.num_heads"
        )
    if config.head_map is not None and not (
        len(config.head_map) == ours and all(0 <= head < theirs for head in config.head_map)
    ):
        raise UserError(
            f"{wanted_by}.head_map is {list(config.head_map)}; it must be {ours} numbers (one a student head), 0 to "
            f"{theirs - 1} (the teacher's heads)"
        )
    model = TEACHERS[config.kind](source, student, soft, f"{wanted_by}.source")
    dtype = PRECISIONS[config.precision] or (torch.float16 if device.type == "cuda" else torch.float32)
    model = model.requires_grad_(False).eval().to(device, dtype)
    return Teacher(model, config.weight, frozenset(soft), config.head_map)


def require_heads(
    source: Source, student: Mapping[str, HeadSpec], soft: Sequence[str], answers: str, wanted_by: str
) -> None:
    """Raises UserError if a head that must teach is not there, or answers other than the student's."""
    lacking = [task for task in soft if task not in source.heads]
    if lacking:
        raise UserError(
            f"the teacher {source.name!r} has no head for {', '.join(lacking)} (it has "
            f"{', '.join(source.heads) or 'none'}), so it cannot give soft labels there. Three ways out: a teacher "
            "that has it (ViLT's own vilt_200k_mlm_itm.ckpt has mlm and itm; or train one, recipe vilt-pretrain); "
            f"{wanted_by}.tasks={[t for t in soft if t not in lacking]} to take the others' alone; or distill.soft=0 "
            "distill.hard=1"
        )
    for task in soft:
        theirs, ours = source.heads[task], student[task]
        if task == "vqa" and not theirs.meaning:
            if not answers:
                raise UserError(
                    f"the teacher {source.name!r} does not tell which answers its {theirs.num_outputs} outputs are; "
                    f"set {wanted_by}.answers to a file that lists them in its order"
                )
            theirs = theirs._replace(meaning=answers)
        if theirs != ours:
            raise UserError(
                f"the teacher {source.name!r} and the student answer {task} with different answers or in another "
                f"order ({theirs.num_outputs} and {ours.num_outputs} outputs); both must be trained with the same file"
            )


def teach(teachers: Sequence[Teacher], batch: Batch) -> tuple[Lesson, ...]:
    """What the teachers say of a batch, without gradient, without random numbers, and in no order but the raster's."""
    lessons = []
    for teacher in teachers:
        with torch.inference_mode():
            output: Output = teacher.model(batch)
        # Out of inference mode as copies: autograd cannot keep an inference tensor for the way back.
        taps = {
            site: tap._replace(query=tap.query.clone(), key=tap.key.clone(), query_mask=tap.query_mask.clone(),
                               key_mask=tap.key_mask.clone())
            for site, tap in output.taps.items()
        }  # fmt: skip
        logits = {task: logit.clone() for task, logit in output.logits.items()}
        lessons.append(Lesson(Output(logits, taps), teacher.weight, teacher.soft, teacher.head_map))
    return tuple(lessons)
