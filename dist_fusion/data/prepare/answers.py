"""The answers of VQAv2 by ViLT's rule: which there are, in what order, and how much each is worth.

The order is that of a model's outputs, so it follows the rule of the models that are published (arXiv:2102.03334),
its odd corners included: answers are normalised for the vocabulary, yet looked up in it as the annotators wrote them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dist_fusion.schema import UserError

LEAST = 9
"""An answer enters the vocabulary if so many questions have it as their most common one."""
SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Worth of an answer by how many of the ten annotators gave it, four and more being the last."""
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")
NUMBER_COMMA = re.compile(r"\d,\d")
SHORTENED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll "
    "why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)
"""Words of VQA's evaluation whose apostrophe is put back where one was forgotten."""
FORGOTTEN = {
    word[:i] + word[i + 1 :]: word for word in SHORTENED.split() for i, letter in enumerate(word) if letter == "'"
}
RESPELLED = {**FORGOTTEN, "somebody'd": "somebodyd"}


def normalised(answer: str) -> str:
    """An answer without case, punctuation, articles and spelled-out numbers."""
    closed = bool(NUMBER_COMMA.search(answer))
    bare = answer
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if closed or beside_space else " ")
    words = [NUMBERS.get(word, word) for word in PERIOD.sub("", bare).lower().split()]
    return " ".join(RESPELLED.get(word, word) for word in words if word not in ARTICLES)


def vocabulary(most_common: Iterable[str]) -> list[str]:
    """The answers of LEAST questions or more, of the most common answer of each question, by first appearance."""
    counts = Counter(map(normalised, most_common))
    return [answer for answer, count in counts.items() if count >= LEAST]


def scores(given: Iterable[str], known: frozenset[str]) -> dict[str, float]:
    """The worth of each known answer among those that the annotators gave."""
    counts = Counter(given)
    return {answer: SCORES[min(count, 4)] for answer, count in counts.items() if answer in known}


def in_order_of(path: Path, found: Sequence[str]) -> list[str]:
    """`found` in the order of a teacher's list: a JSON list, {"answers": [...]}, or id2label ({"0": ...}) alone or in a
    config.json.

    Raises:
        UserError: if the list is unreadable or has other answers than those found.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        for key in ("answers", "id2label"):
            tree = tree[key] if isinstance(tree, dict) and key in tree else tree
        listed = [str(tree[str(i)] if isinstance(tree, dict) else tree[i]) for i in range(len(tree))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--answers is {str(path)!r}: {type(error).__name__}: {error}; it must be a JSON list of answers, "
            '{"answers": [...]}, or {"0": answer, ...} as in id2label'
        ) from None
    strange, missing = sorted(set(listed) - set(found)), sorted(set(found) - set(listed))
    if strange or missing or len(listed) != len(found):
        raise UserError(
            f"--answers {path} has {len(listed)} answers and the annotations give {len(found)}: "
            f"{len(missing)} are not in the list ({', '.join(missing[:5]) or 'none'}), {len(strange)} only there "
            f"({', '.join(strange[:5]) or 'none'}); a head can only be shared with a teacher of the same answers"
        )
    return listed
