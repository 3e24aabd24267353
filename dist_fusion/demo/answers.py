"""The demo's table: how well teacher and students answer, beside what the questions alone give away."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dist_fusion.data.shards import find_shards, read_records
from dist_fusion.demo.split import TASK, read_test
from dist_fusion.evaluate import evaluate
from dist_fusion.models.weights import restore_model
from dist_fusion.tasks.measures import Score

ROWS = {"teacher": "teacher-vqa", "student": "student-vqa", "undistilled": "undistilled-vqa"}
"""Row of the table -> the run whose model answers."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "all": ("colour", "shape", "yes/no"),
    "open": ("colour", "shape"),
    "yes_no": ("yes/no",),
    "colour": ("colour",),
    "shape": ("shape",),
}
"""Column -> the kinds of questions in it."""
Accuracy = dict[str, dict[str, float]]
"""row -> column -> percent"""


def accuracy(folder: Path, seed: int) -> Accuracy:
    """Every row on the whole test split."""
    scores = {row: _model_scores(folder, folder / f"seed-{seed}" / run) for row, run in ROWS.items()}
    scores["question_only"] = question_only(folder)
    return {
        row: {column: round(sum((kinds[k] for k in of), Score(0, 0)).percent, 2) for column, of in COLUMNS.items()}
        for row, kinds in scores.items()
    }


def _model_scores(folder: Path, run: Path) -> dict[str, Score]:
    card, model = restore_model(run, "the demo's run")
    tasks, stream = read_test(folder, card)
    return evaluate(model, tasks, stream, torch.device("cpu")).scores[TASK]


def question_only(folder: Path) -> dict[str, Score]:
    """The score of giving each question the answer it mostly has in train, without looking at the image."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, _ in _questions(folder / "shards" / "train"):
        seen[question][answer] += 1
    everyday = sum(seen.values(), Counter()).most_common(1)[0][0]
    scores: dict[str, Score] = defaultdict(lambda: Score(0, 0))
    for question, answer, kind in _questions(folder / "shards" / "test"):
        said = seen[question].most_common(1)[0][0] if question in seen else everyday
        scores[kind] += Score(float(said == answer), 1)
    return scores


def _questions(split: Path) -> list[tuple[str, str, str]]:
    records = read_records(find_shards([str(split)]))
    return [(q["question"], max(q["answers"], key=q["answers"].get), q["kind"]) for r in records for q in r.questions]


def mean(tables: Sequence[Accuracy]) -> Accuracy:
    """The mean of several seeds' tables."""
    return {
        row: {column: round(sum(t[row][column] for t in tables) / len(tables), 2) for column in columns}
        for row, columns in tables[0].items()
    }


def as_markdown(results: Mapping[str, object]) -> str:
    """`results.json` for people."""
    seeds: Sequence[Accuracy] = results["by_seed"]  # type: ignore[assignment]
    table: Accuracy = results["accuracy"]  # type: ignore[assignment]
    names = {
        "teacher": "teacher (ViLT, fusion encoder)",
        "student": "student, distilled",
        "undistilled": "same student, not distilled",
        "question_only": "question only (no image)",
    }
    lines = [
        "# easy-VQA, test split: 9,673 questions to 1,000 images",
        "",
        f"Accuracy in percent, {'one seed' if len(seeds) == 1 else f'mean of {len(seeds)} seeds'}. "
        "Read the open column: most yes/no questions are answered by their wording.",
        "",
        "| | open | colour | shape | yes/no | all |",
        "|---|---|---|---|---|---|",
        *(
            f"| {names[row]} | **{c['open']:.1f}** | {c['colour']:.1f} | {c['shape']:.1f} | {c['yes_no']:.1f} | "
            f"{c['all']:.1f} |"
            for row, c in table.items()
        ),
        "",
    ]
    gains = [t["student"]["open"] - t["undistilled"]["open"] for t in seeds]
    kept, kept_open = ([_share(t["student"][of], t["teacher"][of]) for t in seeds] for of in ("all", "open"))
    lines += [
        f"- Distillation adds {_listed(gains)} points on open questions (same data, same budget, same start).",
        f"- The student keeps {_listed(kept)} % of the teacher's accuracy ({_listed(kept_open)} % on open questions).",
        "",
        "## Inference",
        "",
    ]
    lines += [str(line) for line in results["timing_lines"]]  # type: ignore[attr-defined]
    seconds: Mapping[str, float] = results["seconds"]  # type: ignore[assignment]
    lines += ["", "## Seconds by part", "", "| part | s |", "|---|---|"]
    lines += [f"| {part} | {value:.0f} |" for part, value in seconds.items()]
    return "\n".join(lines) + "\n"


def _share(part: float, whole: float) -> float:
    """In percent; nan of nothing (a teacher of a few steps may know no answer)."""
    return 100 * part / whole if whole else float("nan")


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def write(folder: Path, results: Mapping[str, object]) -> None:
    """`results.json` and `results.md`."""
    (folder / "results.md").write_text(as_markdown(results))
    partial = folder / "results.json.partial"
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.replace(folder / "results.json")
