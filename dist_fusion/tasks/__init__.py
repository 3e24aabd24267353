"""What can be asked of images and texts. A task is one file and one line in TASKS.

Its class is both the task's section in a recipe and its behaviour: what it lays into the pair batch, the head it
needs, its losses row by row, and how it is scored. TASKS knows nothing of models, shards or DeepSpeed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Protocol

from torch import Tensor

from dist_fusion.batch import Lays
from dist_fusion.tasks.itc import Itc
from dist_fusion.tasks.itm import Itm
from dist_fusion.tasks.measures import Judged, Score, Verdict
from dist_fusion.tasks.mlm import Mlm
from dist_fusion.tasks.nlvr2 import Nlvr2
from dist_fusion.tasks.retrieval import Retrieval
from dist_fusion.tasks.snli_ve import SnliVe
from dist_fusion.tasks.vqa import Vqa
from dist_fusion.types import HeadSpec, Target, Vocabulary


class Task(Lays, Protocol):
    """What every task can do. Losses are per row [R]; weighting and reduction are the objective's."""

    teachable: ClassVar[bool]  # a teacher's logits can be learned from
    num_images: ClassVar[int]  # of a sample it looks at
    limit: ClassVar[str]  # its key for how much of what an image is asked is drawn; "" if it draws nothing

    @property
    def weight(self) -> float: ...  # of the task's losses in the total

    def head(self, vocabulary: Vocabulary) -> HeadSpec: ...

    def hard_loss(self, logits: Tensor, target: Target) -> Tensor: ...

    def soft_loss(self, student: Tensor, teacher: Tensor) -> Tensor: ...

    def judge(self, logits: Tensor, target: Target) -> Verdict: ...

    def kinds(self) -> tuple[str, ...]: ...  # what scores are split by

    def classes(self) -> tuple[str, ...]: ...  # of its answers, where it helps to see which was taken for which

    def measures(self, judged: Judged) -> dict[str, Score]: ...  # what only all rows together can tell


TASKS: dict[str, type[Task]] = {
    "mlm": Mlm,
    "itm": Itm,
    "itc": Itc,
    "vqa": Vqa,
    "nlvr2": Nlvr2,
    "snli_ve": SnliVe,
    "retrieval": Retrieval,
}
"""Tasks by the name they have in a recipe."""
TEACHABLE = {name for name, kind in TASKS.items() if kind.teachable}
"""Tasks with a soft-label loss."""
PAIRED = {name for name, kind in TASKS.items() if kind.num_images == 2}
"""Tasks that look at two images of a sample."""
LIMITS = {name: kind.limit for name, kind in TASKS.items() if kind.limit}
"""Keys of tasks that draw some of what an image is asked; a score is of all."""
BLOCKED = {name for name, kind in TASKS.items() if "block" in kind.__dataclass_fields__}  # type: ignore[attr-defined]
"""Tasks that draw inside blocks of samples; their `block` says of how many."""


def to_score(tasks: Mapping[str, Task]) -> dict[str, Task]:
    """The tasks as they are scored: asking every image all that there is."""
    return {name: replace(task, **{LIMITS[name]: 0}) if name in LIMITS else task for name, task in tasks.items()}  # type: ignore[type-var]
