"""A recipe (YAML) and `key.sub=value` overrides -> one frozen, checked Config.

Each section's dataclass stands beside the code that reads it. Here are only the root, the way in, and the rules between
sections, which are checked before anything expensive starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml

from dist_fusion.data.stream import DataConfig
from dist_fusion.distill import TARGETS, DistillConfig
from dist_fusion.models import CONTRASTIVE
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.initial import Towers
from dist_fusion.models.teachers import TeacherConfig
from dist_fusion.schema import UserError, build, dotted, nearest, section
from dist_fusion.tasks import BLOCKED, LIMITS, PAIRED, TASKS, TEACHABLE, Task

LISTS = {"teachers"}
"""Keys that hold a list of sections, whose places are numbers in an override."""
RECIPES = Path(__file__).parent / "recipes"

if TYPE_CHECKING:
    Tasks = Any
else:
    Tasks = section(make_dataclass("Tasks", [(name, kind | None, None) for name, kind in TASKS.items()], frozen=True))


@section
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a linear decay to 0."""

    learning_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    weight_decay: float = 0.01  # none on biases, norms, type embeddings and the temperature
    # Of the rate, by the beginning of a parameter's dotted name, where the longest counts: {heads: 10}.
    multipliers: Annotated[Mapping[str, float], dotted] = field(default_factory=dict)
    warmup: float = 0.1  # share of the steps
    clip: float = 1.0  # norm of the gradient; 0 is never


@section
@dataclass(frozen=True)
class HealthConfig:
    """When a run helps itself, and when it ends."""

    streak: int = 20  # dropped steps in a row after which it goes back to its last checkpoint once, then stops
    spike: float = 0.0  # a step is dropped whose loss is more than so many times the median of the last 50; 0 is never
    hang_minutes: float = 30.0  # without a step: then each rank writes its stack and ends


@section
@dataclass(frozen=True)
class Config:
    """Everything about a run."""

    name: str  # of the run's folder in `runs`
    tasks: Tasks
    steps: int  # optimizer steps
    global_batch: int  # samples in an optimizer step, on all ranks
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    initialise_from: str | Towers | None = None  # a run, a ViLT, or a BERT and a ViT, whose weights to start from
    deepspeed: str = "zero1"  # a file of ds_configs, or a path
    accumulation: int = 1  # micro-steps in an optimizer step; contrast sees global_batch / accumulation samples
    activation_checkpointing: bool = False  # keep each layer's input alone and compute the rest again: less memory
    compile: bool = False  # torch.compile of the towers and the fusion
    teacher_stream: bool = False  # on a GPU teachers run beside the student's forward: faster, memory for both at once
    deterministic: bool = False  # on a GPU: the same to the last bit every time, and slower
    seed: int = 0
    save_every: int = 500  # steps
    save_minutes: float = 30.0  # or so many minutes after the last save, if that is earlier; 0 is never
    save_async: bool = True  # write beside the next steps; takes as much of the host's memory as the rank's shard
    keep_checkpoints: int = 2  # the newest
    keep_epochs: int = 0  # and the first of every so many epochs; 0 is none
    keep_best: str = ""  # and the one with the best score of this name, such as dev/vqa/accuracy
    time_budget: float = 0.0  # minutes, after which the run saves and ends with code 75; 0 is none
    evaluate_every: int = 0  # steps; scores on data.dev, 0 is never
    overlay_every: int | None = None  # steps; pictures of attention in TensorBoard, evaluate_every if null, 0 is never
    log_every: int = 10  # steps
    health: HealthConfig = field(default_factory=HealthConfig)
    trust_run: bool = False  # continue a run whose folder is another user's: its checkpoints could run code
    runs: str = "runs"

    def active_tasks(self) -> dict[str, Task]:
        """The recipe's tasks by name, in the order of TASKS."""
        return {name: task for name in TASKS if (task := getattr(self.tasks, name)) is not None}

    def overlays_every(self) -> int:
        """Steps from one picture of attention to the next; 0 is never."""
        return self.evaluate_every if self.overlay_every is None else self.overlay_every

    def soft_tasks(self, teacher: TeacherConfig) -> tuple[str, ...]:
        """The tasks whose soft labels one of the teachers gives."""
        if not self.distill.soft:
            return ()
        return tuple(
            task
            for task in self.active_tasks()
            if task in TEACHABLE and (teacher.tasks is None or task in teacher.tasks)
        )

    def micro_batch(self, world_size: int) -> int:
        """Samples of one rank in one forward; raises UserError if the global batch does not divide."""
        ways = self.accumulation * world_size
        if self.global_batch % ways:
            raise UserError(
                f"global_batch {self.global_batch} does not divide by accumulation {self.accumulation} x "
                f"{world_size} ranks = {ways}"
            )
        micro = self.global_batch // ways
        for name in self.active_tasks():
            block = getattr(self.tasks, name).block if name in BLOCKED else 1
            if micro % block:
                raise UserError(
                    f"a micro-batch is {micro} samples (global_batch {self.global_batch} / accumulation "
                    f"{self.accumulation} / {world_size} ranks), which is no multiple of tasks.{name}.block {block}: "
                    "negatives are drawn inside blocks, so that they do not depend on the ranks"
                )
        return micro


def load(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config of a recipe (a path, or the name of a shipped one) and its overrides, the last one winning.

    Raises:
        UserError: for an unknown recipe, key or value, or a combination that cannot work.
    """
    path = find_recipe(recipe)
    tree = read_tree(path)
    for override in overrides:
        _apply(tree, override)
    tasks = tree.get("tasks")
    if isinstance(tasks, Mapping):  # `itc:` with nothing after it is the task with its defaults, `itc: false` is none
        tree["tasks"] = {
            name: {} if given is None else None if given is False else given for name, given in tasks.items()
        }
    config = build(Config, tree, str(path))
    check(config)
    return config


def read_tree(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a recipe, laid over those of the recipe that it is `based_on`.

    Raises:
        UserError: if it is no mapping in YAML, or is based on itself.
    """
    if path.resolve() in [one.resolve() for one in above]:
        raise UserError(f"{' is based on '.join(map(str, [*above, path]))}: a recipe cannot be based on itself")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a recipe: it must be a mapping of keys")
    base = tree.pop("based_on", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: based_on is {base!r}; it must be one recipe's name or path")
    beside = path.parent / f"{base}.yaml"
    own = beside.is_file() and beside.resolve() != path.resolve()  # a recipe may carry the name of the shipped one
    return _laid_over(read_tree(beside if own else find_recipe(base), (*above, path)), tree)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two trees as one: sections are joined key by key, anything else is replaced."""
    joined = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        joined[key] = _laid_over(below[key], value) if both else value
    return joined


def find_recipe(recipe: str | Path) -> Path:
    """A path that exists, or the shipped recipe of that name."""
    shipped = {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}
    path = Path(recipe)
    if path.is_file():
        return path
    if str(recipe) in shipped:
        return shipped[str(recipe)]
    raise UserError(
        f"no recipe {str(recipe)!r}{nearest(str(recipe), shipped)}; shipped: {', '.join(shipped)}; or give a path"
    )


def recipe_of(run: Path) -> Config:
    """The recipe of a run, from its folder. Raises UserError if it is no run."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no run: it has no config.yaml")
    return load(run / "config.yaml")


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override!r} is no override; write key.sub=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of {override!r} is not YAML: {error}") from None
    parts = key.split(".")
    node: Any = tree
    for part in parts[:-1]:
        place = _place(node, part, override)
        if isinstance(node[place], int | float | str) and not isinstance(node[place], bool):
            raise UserError(f"{override!r} asks for a key of {part}, which is {node[place]!r} and has none")
        if not isinstance(node[place], dict | list):
            node[place] = [] if part in LISTS else {}
        node = node[place]
    node[_place(node, parts[-1], override)] = parsed


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> str | int:
    """Where `part` of a dotted key leads in `node`: made if it is a mapping, or the next place of a list."""
    if isinstance(node, dict):
        node.setdefault(part, None)
        return part
    if not part.isdecimal() or int(part) > len(node):
        raise UserError(f"{override!r} counts from 0 to {len(node)} where it says {part!r}")
    if int(part) == len(node):
        node.append(None)
    return int(part)


def dump(config: Config) -> str:
    """The resolved recipe as YAML; it loads back to an equal Config."""
    tree = asdict(config)
    tree["tasks"] = {name: task for name, task in tree["tasks"].items() if task is not None}
    return yaml.safe_dump(_plain(tree), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def check(config: Config) -> None:
    """Rules between sections; a section checks itself. Raises UserError."""
    model, distill, tasks = config.model, config.distill, config.active_tasks()
    for key, value, low, high in (
        ("steps", config.steps, 1, inf),
        ("global_batch", config.global_batch, 1, inf),
        ("accumulation", config.accumulation, 1, inf),
        ("save_every", config.save_every, 1, inf),
        ("save_minutes", config.save_minutes, 0, inf),
        ("keep_epochs", config.keep_epochs, 0, inf),
        ("time_budget", config.time_budget, 0, inf),
        ("health.streak", config.health.streak, 1, inf),
        ("health.hang_minutes", config.health.hang_minutes, 0.01, inf),
        ("log_every", config.log_every, 1, inf),
        ("evaluate_every", config.evaluate_every, 0, inf),
        ("overlay_every", config.overlays_every(), 0, inf),
        ("optimizer.learning_rate", config.optimizer.learning_rate, 0, inf),
        ("optimizer.weight_decay", config.optimizer.weight_decay, 0, inf),
        ("optimizer.clip", config.optimizer.clip, 0, inf),
        *((f"optimizer.betas.{i}", beta, 0, 0.999999) for i, beta in enumerate(config.optimizer.betas)),
        *((f"tasks.{name}.weight", task.weight, 0, inf) for name, task in tasks.items()),
        *(
            (f"tasks.{name}.{LIMITS[name]}", getattr(tasks[name], LIMITS[name]), 0, inf)
            for name in tasks
            if name in LIMITS
        ),
        *((f"teachers.{i}.weight", teacher.weight, 1e-6, inf) for i, teacher in enumerate(config.teachers)),
        *((f"data.sources.{name}.weight", one.weight, 1e-6, inf) for name, one in config.data.sources.items()),
        *((f"optimizer.multipliers.{prefix}", of, 1e-6, 1e6) for prefix, of in config.optimizer.multipliers.items()),
        ("optimizer.warmup", config.optimizer.warmup, 0, 1),
        ("model.dropout", model.dropout, 0, 0.99),
        ("model.max_text_length", model.max_text_length, 3, inf),
        ("distill.hard", distill.hard, 0, inf),
        ("distill.soft", distill.soft, 0, inf),
        ("distill.attention", distill.attention, 0, inf),
        ("distill.temperature", distill.temperature, 1e-6, inf),
        ("data.texts_per_image", config.data.texts_per_image, 0, inf),
        ("data.shuffle_buffer", config.data.shuffle_buffer, 1, inf),
        ("data.num_workers", config.data.num_workers, 0, inf),
        ("data.most_damaged", config.data.most_damaged, 0, 1),
        ("tasks.mlm.probability", config.tasks.mlm.probability if config.tasks.mlm else 1, 0, 1),
        ("tasks.itc.dimensions", config.tasks.itc.dimensions if config.tasks.itc else 1, 1, inf),
    ):
        if not low <= value <= high:
            raise UserError(
                f"{key} is {value}; it must be {f'at least {low:g}' if high == inf else f'{low:g} to {high:g}'}"
            )
    if config.keep_checkpoints < 2:
        raise UserError("keep_checkpoints must be at least 2: one may be broken while it is written")
    if config.health.spike and config.health.spike <= 1:
        raise UserError(
            f"health.spike is {config.health.spike}; it must be above 1 (times the usual loss), or 0 for never"
        )
    if config.keep_best and not config.evaluate_every:
        raise UserError(f"keep_best is {config.keep_best!r}, a score on data.dev; set evaluate_every, too")
    folder = Path(config.name)
    if not folder.parts or folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"name is {config.name!r}; it must name a folder inside {config.runs}")
    if config.evaluate_every and not config.data.dev:
        raise UserError("evaluate_every is set but data.dev names no shards")
    if not tasks:
        raise UserError(f"tasks is empty; name at least one of {', '.join(TASKS)}")
    if model.kind not in CONTRASTIVE and "itc" in tasks:
        raise UserError(f"tasks.itc needs a vector for each image and text, and a {model.kind} has none; leave itc out")
    paired = ", ".join(f"tasks.{name}" for name in tasks if name in PAIRED)
    if paired and model.num_slots < 2:
        raise UserError(f"{paired} looks at two images of a sample; set model.num_slots=2 (it is {model.num_slots})")
    sites = TARGETS[distill.targets]
    if model.kind == "fusion-encoder" and sites:
        raise UserError("distill.targets must be none for a fusion-encoder: it has no towers and no bridge to teach")
    if any(site.startswith("bridge") for site in sites) and not model.fusion.startswith("bridge"):
        raise UserError(
            f"distill.targets is {distill.targets!r}, but model.fusion {model.fusion!r} has no attention of its own; "
            "use a bridge, or distill.targets=towers"
        )
    if distill.needs_teacher and not config.teachers:
        raise UserError(
            f"distill.targets={distill.targets} and distill.soft={distill.soft} need a teacher; set teachers, or "
            "distill.targets=none distill.soft=0"
        )
    if config.teachers and not distill.needs_teacher:
        raise UserError(
            "a teacher is given but nothing is learned from it; set distill.targets or distill.soft, or teachers=[]"
        )
    for number, teacher in enumerate(config.teachers):
        for task in teacher.tasks or ():
            if task not in TEACHABLE or task not in tasks:
                can = ", ".join(name for name in tasks if name in TEACHABLE) or "none"
                raise UserError(f"teachers.{number}.tasks names {task!r}, which it cannot teach here; it can be {can}")
    if not any(task.weight for task in tasks.values()) and not (sites and distill.attention):
        raise UserError("every task weighs 0, and no attention is matched: nothing would be learned")
    for name, one in tasks.items():
        taught = any(name in config.soft_tasks(teacher) for teacher in config.teachers)
        if one.weight and not distill.hard and not taught:
            raise UserError(
                f"tasks.{name} would learn nothing: distill.hard is 0, and no teacher gives soft labels for it; set "
                f"distill.hard=1, tasks.{name}=false, or tasks.{name}.weight=0 to match its pairs' attention alone"
            )
