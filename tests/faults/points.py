"""Where a rank may die: before, after or in the middle of a call of a function of the product or of what it uses.

The function itself runs as it is. Nothing is replaced; a rank only ends there.
"""

import ctypes
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ALL = -1


class Point(NamedTuple):
    """A place and a time to die at, or to be told something."""

    where: str  # module:function or module:Class.method
    call: int = 1  # the how manieth call
    when: str = "before"  # of WHEN
    rank: int = ALL
    signals: tuple[int, ...] = (signal.SIGKILL,)  # what the process is sent
    path: str = ""  # only calls with an argument that ends so
    lasting: int = 1  # in so many calls from that one on

    def arm(self, rank: int) -> None:
        """Make this process die there, if it is meant."""
        if self.rank not in (ALL, rank):
            return
        module, _, name = self.where.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        usual, count = getattr(owner, last), 0

        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            if any(str(one).endswith(self.path) for one in arguments):
                count += 1
            here = self.call <= count < self.call + self.lasting
            count += here and self.lasting == 1  # once, whatever the next calls' arguments are
            return (WHEN[self.when] if here else _usual)(self, usual, arguments, named)

        setattr(owner, last, counted)

    def strike(self) -> None:
        for number in self.signals:
            os.kill(os.getpid(), number)


Called = Callable[..., Any]


def _usual(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    return usual(*arguments, **named)


def _before(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    point.strike()
    return usual(*arguments, **named)


def _after(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    result = usual(*arguments, **named)
    point.strike()
    return result


def _within(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    """As soon as the file that is being written has some bytes, and surely before it is closed."""
    file = next(one for one in arguments if hasattr(one, "fileno"))

    def watch() -> None:
        while not os.fstat(file.fileno()).st_size:
            time.sleep(0)
        point.strike()

    threading.Thread(target=watch, daemon=True).start()
    result = usual(*arguments, **named)
    time.sleep(1)  # a file of a tiny model may be written before the thread looks
    return result


def _torn(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    """After the first half of the text of a file is on disk under its first name."""
    path, text = arguments
    Path(f"{path}.partial").write_text(text[: len(text) // 2])
    point.strike()
    return usual(*arguments, **named)


def _asleep(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    """A standstill of this thread alone."""
    time.sleep(3600)


def _frozen(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    """A standstill of the whole interpreter, in a library that holds it."""
    ctypes.PyDLL(None).sleep(3600)


def _spoiled(point: Point, usual: Called, arguments: tuple, named: dict) -> Any:
    """A loss that is no number, as a flaw in memory may make it."""
    loss = usual(*arguments, **named)
    return loss._replace(total=loss.total * float("nan"))


WHEN: dict[str, Callable[[Point, Called, tuple, dict], Any]] = {
    "before": _before,
    "after": _after,
    "within": _within,
    "torn": _torn,
    "asleep": _asleep,
    "frozen": _frozen,
    "spoiled": _spoiled,
}
