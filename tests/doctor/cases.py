"""What the checks are asked about in tests."""

from pathlib import Path

import torch

from dist_fusion.doctor.lines import Case
from dist_fusion.engine.sharding import ds_config, sharding
from dist_fusion.facts import Facts, Memory, Part


def case(tmp_path: Path, config=None, facts=None, shards=(), ranks=2) -> Case:
    return Case(config, facts, ranks, ranks, tmp_path, tuple(map(str, shards)), torch.device("cpu"))


def facts(config, parameters: float, ranks: int = 2) -> Facts:
    """Those of a student of so many parameters."""
    held = Memory(0, 0, 0, 0, 0, 0)
    return Facts({"all": Part(int(parameters), 0.0)}, {}, held, sharding(ds_config(config, ranks)), "")


def grades(lines) -> list[str]:
    return [line.grade for line in lines]
