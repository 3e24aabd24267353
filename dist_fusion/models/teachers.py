"""Frozen fusion encoders. A new teacher is one function here and one line in TEACHERS."""

from collections.abc import Callable, Sequence

from torch import nn

from dist_fusion.models.weights import ModelCard, build_model, load_model, require_same_vocabulary
from dist_fusion.schema import UserError


def load_vilt(folder: str, student: ModelCard, soft_tasks: Sequence[str]) -> nn.Module:
    """A ViLT trained here, frozen and in eval mode, with the heads of `soft_tasks` only.

    Raises:
        UserError: if it is no fusion encoder, lacks a head it must teach with, or reads other tokens, patches or heads
            than the student, whose attention could then not be matched.
    """
    card, weights = load_model(folder, "teacher.folder")
    require_same_vocabulary(student, card, folder, "teacher.folder")
    if card.config.kind != "fusion-encoder":
        raise UserError(f"teacher.folder {folder!r} is a {card.config.kind}; a teacher must be a fusion-encoder")
    for key in ("image_size", "patch_size", "num_heads", "num_slots", "max_text_length"):
        ours, theirs = getattr(student.config, key), getattr(card.config, key)
        if ours != theirs:
            raise UserError(f"the teacher {folder!r} has {key} {theirs} and the student {ours}; they must agree")
    lacking = [task for task in soft_tasks if task not in card.heads]
    if lacking:
        raise UserError(
            f"the teacher {folder!r} has no head for {', '.join(lacking)} (it has {', '.join(card.heads)}), so it "
            "cannot give soft labels there: train it on the task, set distill.soft=0, or leave the task out"
        )
    unlike = [task for task in soft_tasks if card.heads[task] != student.heads[task]]
    if unlike:
        raise UserError(
            f"the teacher {folder!r} and the student answer {', '.join(unlike)} with different answers or "
            "in another order; both must be trained with the same answers file"
        )
    teacher = build_model(card._replace(heads={task: card.heads[task] for task in soft_tasks}))
    teacher.load_state_dict({k: v for k, v in weights.items() if k in teacher.state_dict()})
    return teacher.requires_grad_(False).eval()


TEACHERS: dict[str, Callable[[str, ModelCard, Sequence[str]], nn.Module]] = {"vilt": load_vilt}
