"""The page: counts, damages, lengths and sizes, and some samples."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_fusion.data.index import Damage, Outline, outlines
from dist_fusion.data.shards import find_shards
from dist_fusion.data.text import Tokenizer
from dist_fusion.inspect.cards import VISITS, card
from dist_fusion.inspect.charts import Mark, histogram, ranked
from dist_fusion.inspect.counts import COLUMNS, by_reason, holdings, supplies
from dist_fusion.inspect.markup import Cell, Markup, page, table, tag
from dist_fusion.inspect.survey import Survey, choose, samples, survey
from dist_fusion.schema import UserError
from dist_fusion.tasks.mlm import Mlm

MOST_ANSWERS = 20
EXAMPLES = 3
"""Of damages of a reason."""


@dataclass(frozen=True)
class Look:
    """How to look at shards."""

    samples: int = 24  # on the page, drawn by the seed
    seed: int = 0
    size: int = 224  # pixels, of the recipe's model
    vocabulary: str = "bert-base-uncased"
    max_text_length: int = 40  # tokens

    def __post_init__(self) -> None:
        for name, least in (("samples", 0), ("size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least {least}")


def write_page(folders: Sequence[str], out: Path, look: Look) -> list[Outline]:
    """Write what is in the shards of `folders` as one HTML file; the same shards and look make the same file.

    Raises:
        UserError: for shards that are not there, a vocabulary that is none, or a file that cannot be written.
    """
    shards = find_shards(folders)
    tokenizer = Tokenizer(look.vocabulary, look.max_text_length)
    if not out.parent.is_dir() or out.is_dir():
        raise UserError(f"--out is {out}; it must be a file in a folder that is there")
    found = outlines(shards)
    seen = survey(found, look.vocabulary, look.size, look.seed)
    shown = choose(found, look.samples, f"{look.seed}/samples")
    cards = [card(drawn, tokenizer, look.size, look.seed) for drawn in samples(found, shown, look.size)]
    title = "What is in " + ", ".join(folders)
    sections = [
        tag("h1.untrusted", title),
        *_counted(found),
        *_damages([damage for outline in found for damage in outline.damages], seen),
        *_measured(found, seen, look),
        *_asked(found, seen),
        tag("h2", "Samples"),
        tag("p.quiet", _explained(len(cards), look)),
        *cards,
    ]
    try:
        out.write_text(page(title, *sections), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out is {out}, which cannot be written: {error}") from None
    return found


def _explained(count: int, look: Look) -> str:
    return (
        f"{count} drawn by seed {look.seed}. The large picture is what both models see ({look.size} x {look.size} "
        f"pixels, squashed if it is no square); the {VISITS} small ones are RandAugment at {VISITS} visits. Tokens "
        f"are cut at {look.max_text_length}; below them the same with whole words masked as mlm does "
        f"({Mlm().probability:.0%}), each struck out before what stands in its place. Point at a picture or a bar "
        "to be told more."
    )


def _counted(found: Sequence[Outline]) -> list[Markup]:
    rows: list[tuple[Cell, ...]] = [
        (tag("span.untrusted", folder), *one.numbers()) for folder, one in holdings(found).items()
    ]
    return [tag("h2", "Counts"), tag("div.box", table(("folder", *COLUMNS), rows))]


def _damages(indexed: Sequence[Damage], seen: Survey) -> list[Markup]:
    """What is left out, by reason: first what the indices tell of all, then what was found when samples were read."""
    told = [*_reasons(indexed, "in the index"), *_reasons(seen.damages, f"of the {seen.samples:,} read")]
    heads = ("reason", "", "found", f"the first {EXAMPLES}")
    body = table(heads, told) if told else tag("p", "None found.")
    return [tag("h2", "Damaged, and left out"), tag("div.box", body)]


def _reasons(damages: Iterable[Damage], where: str) -> list[tuple[Markup, int, Markup, Markup]]:
    return [
        (tag("b.bad", reason), len(some), tag("span.plain", where),
         tag("div", *(tag("p.untrusted.small", damage.told()) for damage in some[:EXAMPLES])))
        for reason, some in by_reason(damages).items()
    ]  # fmt: skip


def _measured(found: Sequence[Outline], seen: Survey, look: Look) -> list[Markup]:
    """Histograms: tokens of each kind of text, how many an image has, and sizes of images."""
    boxes = []
    for what, lengths in seen.lengths.items():
        if not lengths:
            continue
        cut = sum(count for length, count in lengths.items() if length > look.max_text_length)
        told = f"{cut:,} of {lengths.total():,} ({cut / lengths.total():.2%}) are longer than {look.max_text_length}"
        mark = Mark(look.max_text_length + 1, f"cut at {look.max_text_length}")
        boxes.append(_box(f"Tokens in {what}", told, histogram(lengths, mark)))
    had = supplies(found)
    for what, amounts in (
        ("texts", _amounts((supply.texts, count) for supply, count in had.items())),
        ("questions", _amounts((supply.questions, count) for supply, count in had.items())),
        ("statements", _amounts((len(supply.labels), count) for supply, count in had.items())),
    ):
        if any(amounts):
            told = f"{sum(n * count for n, count in amounts.items()) / amounts.total():.2f} in the mean, of all samples"
            boxes.append(_box(f"{what.capitalize()} of a sample", told, histogram(amounts)))
    small = sum(count for side, count in seen.short_sides.items() if side < look.size)
    enlarged = f"{small:,} of {seen.short_sides.total():,} are smaller than {look.size} pixels, and are enlarged"
    boxes.append(
        _box("Short side of images, pixels", enlarged, histogram(seen.short_sides, Mark(look.size, str(look.size))))
    )
    boxes.append(
        _box(
            "Long side by short side", "1 is a square; all are squashed to one", histogram(seen.proportions, scale=0.1)
        )
    )
    total = supplies(found).total()
    of = "all" if seen.samples == total else f"{seen.samples:,} drawn of {total:,}"
    note = tag("p.quiet", f"Tokens, sizes, answers and kinds: of {of} samples.")
    return [tag("h2", "Lengths and sizes"), note, tag("div.side", *boxes)]


def _asked(found: Sequence[Outline], seen: Survey) -> list[Markup]:
    """Answers, kinds and labels, as far as there are any."""
    labels = [*holdings(found).values()][-1].labels
    given: Mapping[str, Counter[str]] = {
        f"Best answers ({len(seen.answers):,} different)": seen.answers,
        "Kinds of questions": seen.kinds,
        "Labels of statements": labels,
    }
    boxes = [_box(name, "", ranked(counts, MOST_ANSWERS)) for name, counts in given.items() if counts]
    return [tag("h2", "Answers and labels"), tag("div.side", *boxes)] if boxes else []


def _amounts(pairs: Iterable[tuple[int, int]]) -> Counter[int]:
    found: Counter[int] = Counter()
    for amount, count in pairs:
        found[amount] += count
    return found


def _box(name: str, told: str, drawn: Markup) -> Markup:
    return tag("div.box", tag("h3", name), *([tag("p.quiet.small", told)] if told else []), drawn)
