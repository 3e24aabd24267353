"""One sample of a shard as its files say it: `<key>.{jpg,png,webp}`, `<key>.json`, `<key>.txt`.

The JSON holds only the keys it has of: image_id, source, texts, questions [{id, question, answers {answer: score},
kind}], and statements [{id, text, label, group}]; img2dataset's `<key>.txt` is one text. Other files are passed
over, so nothing in a shard can run code: a pickle is not opened.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dist_fusion.data.images import EXTENSIONS

READ = ("json", "txt")
ORDERS = (("",), ("left", "right"), ("left", "middle", "right"), ("img0", "img1"), ("0", "1"))
"""What may stand between the key and the extension of a sample's pictures, in their order."""


class Unusable(ValueError):
    """A sample that cannot be used, by one of few reasons, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Annotations(NamedTuple):
    """What a sample's JSON and text say."""

    image_id: str  # empty if they do not tell
    texts: tuple[str, ...]
    questions: tuple[Mapping[str, Any], ...]
    statements: tuple[Mapping[str, Any], ...]


class Record(NamedTuple):
    """One sample of a shard, its images still encoded."""

    key: str
    images: tuple[bytes, ...]
    image_ids: tuple[str, ...]
    texts: tuple[str, ...]
    questions: tuple[Mapping[str, Any], ...]
    statements: tuple[Mapping[str, Any], ...]


def record(shard: str, key: str, members: Mapping[str, bytes]) -> Record:
    """A sample from its files by what follows their key and a dot. Raises Unusable."""
    said = annotations(members)
    images = tuple(members[name] for name in picture_names(members))
    path = Path(shard)
    place = f"{path.parent.name}/{path.name}/{key}"  # img2dataset's keys repeat from set to set
    name = said.image_id or place.encode(errors="backslashreplace").decode()  # tarfile keeps bytes that are no UTF-8
    ids = (name,) if len(images) < 2 else tuple(f"{name}/{i}" for i in range(len(images)))
    return Record(f"{shard}/{key}", images, ids, said.texts, said.questions, said.statements)


def picture_names(names: Iterable[str]) -> list[str]:
    """Which of a sample's files are its pictures, in their order. Raises Unusable if there are none, or too many."""
    found = {name.rpartition(".")[0]: name for name in names if name.rpartition(".")[2] in EXTENSIONS}
    if not found:
        raise Unusable("no image", f"its files are {', '.join(sorted(names)) or 'none'}")
    order = next((words for words in ORDERS if set(words) == set(found)), None)
    if order is None:
        raise Unusable("dotted key", f"pictures {', '.join(sorted(found.values()))}: a key ends at its first dot")
    return [found[word] for word in order]


def annotations(members: Mapping[str, bytes]) -> Annotations:
    """What a sample's JSON and text say. Raises Unusable."""
    if not any(name in members for name in READ):
        raise Unusable("no text", "it has neither a .json nor a .txt")
    try:
        tree = json.loads(members.get("json", b"{}"))
        plain = members.get("txt", b"").decode()
        texts = tree.get("texts") or [tree["caption"] if "caption" in tree and not plain else plain]
        questions, statements = (tree.get(name) or [] for name in ("questions", "statements"))
        if not all(isinstance(given, list) for given in (texts, questions, statements)):
            raise ValueError("texts, questions and statements must be lists")
        texts = [text for text in texts if text.strip()]
        for question in questions:
            _check_question(question)
        for statement in statements:
            _check_statement(statement)
        if b"\\u" in members.get("json", b""):
            json.dumps(tree, ensure_ascii=False).encode()  # half a surrogate pair is no text: tokenizers refuse it
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise Unusable("unreadable .json or .txt", str(error)) from None
    if not (texts or questions or statements):
        raise Unusable("empty caption", "it has no text, question or statement")
    name = str(tree.get("image_id") or tree.get("url") or "")
    return Annotations(name, tuple(texts), tuple(questions), tuple(statements))


def _check_question(question: Mapping[str, Any]) -> None:
    """Refuse a question that could not be asked later, in the middle of training, on one rank alone."""
    well = isinstance(question["question"], str) and isinstance(question["answers"], dict) and "id" in question
    if not well or not all(isinstance(score, int | float) for score in question["answers"].values()):
        raise ValueError('a question must be {"id", "question": text, "answers": {answer: score}}')


def _check_statement(statement: Mapping[str, Any]) -> None:
    """Refuse a statement that could not be judged later; a label must be a string, since bool("False") is true."""
    well = isinstance(statement, dict) and statement.keys() >= {"id", "text", "label"}
    if not well or not all(isinstance(statement.get(key, ""), str) for key in ("text", "label", "group")):
        raise ValueError('a statement must be {"id", "text": text, "label": text} and may have "group": text')
