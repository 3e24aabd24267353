from pathlib import Path
from typing import Any


def load_elastic(engine: Any, folder: Path) -> None:
    raise NotImplementedError
