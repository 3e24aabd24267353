"""YAML data -> frozen dataclass, or a `UserError` that says which key is wrong and what would be right.

pydantic does the typing of plain standard-library dataclasses; here are entries of tables as types, and the wording.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, TypeAdapter, ValidationError, with_config

T = TypeVar("T")
section = with_config(ConfigDict(extra="forbid", strict=False))
"""Decorator of a recipe's section: unknown keys are refused."""


class UserError(ValueError):
    """The user asked for what cannot be; the message says what, where, and what would be right."""


def one_of(table: Mapping[str, Any]) -> AfterValidator:
    """Annotation of a string field that must name an entry of `table`."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"it can be {', '.join(table)}{nearest(name, table)}")
        return name

    return AfterValidator(check)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings, each with its dotted path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree


dotted = BeforeValidator(lambda tree: dict(leaves(tree)) if isinstance(tree, dict) else tree)
"""Annotation of a mapping by dotted paths, which may be written nested, as overrides do."""


def nearest(name: str, known: Mapping[str, Any] | set[str]) -> str:
    """`; did you mean 'x'?` if something known is near `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def build(kind: type[T], tree: Any, where: str) -> T:
    """`tree` as a `kind`; raises UserError with every wrong key of `where`, each with what would be right."""
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(kind, problem) for problem in error.errors()]
        raise UserError(f"{where}:\n  " + "\n  ".join(dict.fromkeys(lines))) from None


def _explain(kind: Any, problem: Any) -> str:
    path = _keyed(kind, problem["loc"])
    known = _keys(kind, path[:-1])
    named = ".".join(path)
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        hint = nearest(path[-1], known or set()) or f"; known keys: {', '.join(sorted(known or set()))}"
        return f"unknown key {named!r}{hint}"
    if problem["type"] == "missing":
        return f"{named} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{named or 'recipe'} is {problem['input']!r}: {message}"


def _keyed(kind: Any, place: Sequence[str | int]) -> list[str]:
    """A place in a tree by its keys alone: where a key takes one of several types, pydantic names the type as well."""
    path = []
    for part in place:
        options = {getattr(option, "__name__", ""): option for option in get_args(kind)}
        if part in options:
            kind = options[str(part)]
            continue
        path.append(str(part))
        inside = next((option for option in (kind, *options.values()) if is_dataclass(option)), None)
        kind = inside if isinstance(part, int) else get_type_hints(inside).get(part) if inside else None
    return path


def _keys(kind: Any, path: list[str]) -> set[str] | None:
    """The known keys of the section that `path` leads to."""
    for part in path:
        if is_dataclass(kind):
            kind = get_type_hints(kind).get(part, kind)
        for option in get_args(kind):
            if is_dataclass(option):
                kind = option
    return {field.name for field in fields(kind)} if is_dataclass(kind) else None
