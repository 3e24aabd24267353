"""Reading what data sets ship, with a user's words for what is missing or in another form."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dist_fusion.schema import UserError


def find(source: Path, names: Sequence[str], what: str) -> Path:
    """The first of `names` under `source` that exists.

    Raises:
        UserError: if none does; `what` tells which download has it.
    """
    for name in names:
        if (source / name).exists():
            return source / name
    others = f" (nor {', '.join(names[1:])})" if names[1:] else ""
    raise UserError(f"{source} has no {names[0]}{others}; it comes with {what}")


@contextmanager
def in_form(path: Path, form: str) -> Iterator[None]:
    """Turns the errors of going through a file that is in another form than `form` into a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} is not in the form of {form}: {error} is missing or unknown") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not in the form of {form}: {type(error).__name__}: {error}") from None


def read_json(path: Path, form: str, slim: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The JSON of a file; `slim` says what is kept of each of its objects, as it is read."""
    with in_form(path, form), path.open(encoding="utf-8") as file:
        return json.load(file, object_hook=slim)


def read_lines(path: Path, form: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with the number of its line, from 1."""
    with in_form(path, form), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON object of {form}: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is no JSON object of {form}")
            yield number, row


def listed_files(folder: Path) -> Iterator[Path]:
    """All files under a folder in the order of their names, hidden ones left out."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from listed_files(path)
        else:
            yield path
