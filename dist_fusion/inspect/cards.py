"""One sample as training sees it: its pixels, plain and augmented, its tokens, masked ones, and what is asked."""

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping
from random import Random
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dist_fusion.batch import Text
from dist_fusion.data.augment import augment
from dist_fusion.data.images import pixels
from dist_fusion.data.text import Tokenizer
from dist_fusion.inspect.markup import Inside, Markup, joined, tag
from dist_fusion.inspect.survey import Drawn
from dist_fusion.tasks.mlm import Mlm, mask_words

VISITS = 3
"""How often a picture is shown augmented."""
MOST_TEXTS = 6
"""Of a kind that a card shows."""
MOST_LETTERS = 1000
"""Of a text that a card shows."""


def card(drawn: Drawn, tokenizer: Tokenizer, size: int, seed: int) -> Markup:
    """What there is to see of one sample, at a first visit in a run of this seed."""
    visit = f"{seed}/{drawn.number}"
    trouble = [tag("p.bad.untrusted", f"{drawn.damage.reason}: {drawn.damage.detail}")] if drawn.damage else []
    views = [_views(image, visit, number, size) for number, image in enumerate(drawn.images)]
    told: list[Markup] = []
    if drawn.record:
        record = drawn.record
        told = [
            *_some("text", (_text(text, n, tokenizer, visit) for n, text in enumerate(record.texts[:MOST_TEXTS])),
                   len(record.texts)),
            *_some("question", (_question(one, tokenizer) for one in record.questions[:MOST_TEXTS]),
                   len(record.questions)),
            *_some("statement", (_statement(one, tokenizer) for one in record.statements[:MOST_TEXTS]),
                   len(record.statements)),
        ]  # fmt: skip
    key = tag("h3.key.untrusted", drawn.key)
    return tag("article.box.sample", key, tag("div", *trouble, *views), tag("div", *told))


def _views(image: Image.Image, visit: str, number: int, size: int) -> Markup:
    """A picture as both models see it, and as they would see it augmented at later visits."""
    seen = _picture(pixels(image, size), "as the model sees it", "seen")
    changed = [
        _picture(pixels(augment(image, "randaugment", f"{visit}/{later}/image{number}"), size), "augmented", "changed")
        for later in range(VISITS)
    ]
    return tag("div.views", seen, *changed)


def _picture(seen: Tensor, told: str, kind: str) -> Markup:
    """[3, h, w] from -1 to 1 as an image in the page itself."""
    levels = ((seen + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=90)
    address = "data:image/jpeg;base64," + b64encode(buffer.getvalue()).decode()
    return tag(f"img.{kind}", attributes={"src": address, "alt": told, "title": told})


def _some(what: str, shown: Iterable[Markup], total: int) -> list[Markup]:
    made = list(shown)
    more = total - len(made)
    return [*made, *([tag("p.said.quiet", f"and {more:,} more {what}{'s' if more > 1 else ''}")] if more else [])]


def _text(string: str, number: int, tokenizer: Tokenizer, visit: str) -> Markup:
    """A caption, its tokens, and the same with words masked as `Mlm` does."""
    text = tokenizer(string)
    masked, hidden = mask_words(text, Mlm().probability, tokenizer.vocabulary, Random(f"{visit}/mlm/{number}"))
    return _said("text", string, _tokens(text, text, [], tokenizer), _tokens(text, masked, hidden, tokenizer))


def _question(question: Mapping[str, Any], tokenizer: Tokenizer) -> Markup:
    text = tokenizer(question["question"])
    best = sorted(question["answers"].items(), key=lambda item: -item[1])
    answers = ", ".join(f"{answer} {score:g}" for answer, score in best) or "no answer"
    kind = question.get("kind")
    told = tag("p.untrusted", tag("b", answers), f" ({kind})" if kind else "")
    return _said("question", question["question"], told, _tokens(text, text, [], tokenizer))


def _statement(statement: Mapping[str, Any], tokenizer: Tokenizer) -> Markup:
    text = tokenizer(statement["text"])
    label = tag("p.untrusted", tag("b", statement["label"]))
    return _said("statement", statement["text"], label, _tokens(text, text, [], tokenizer))


def _said(what: str, string: str, *below: Markup) -> Markup:
    left = len(string) - MOST_LETTERS
    more = tag("span.quiet", f" … and {left:,} more letters") if left > 0 else ""
    shown = tag("span.untrusted", string[:MOST_LETTERS])
    return tag("div.said", tag("p", tag("span.quiet.small", f"{what} "), shown, more), *below)


def _tokens(text: Text, masked: Text, hidden: Iterable[int], tokenizer: Tokenizer) -> Markup:
    """The entries of a text one by one; what is hidden is struck out before what stands in its place."""
    places = set(hidden)
    shown: list[Inside] = []
    for place, (before, after) in enumerate(zip(text.ids, masked.ids, strict=True)):
        old, new = tokenizer.entries[before], tokenizer.entries[after]
        if place not in places:
            shown.append(tag("span", old))
        elif before == after:
            shown.append(tag("mark", old, " (asked, stays)"))
        else:
            shown.append(tag("mark", tag("s", old), " ", new))
    return tag("div.tokens.untrusted", joined(shown, " "))
