"""What is installed: Python, packages, compilers, ffmpeg, and compiled code."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

from dist_fusion.data.video import find_ffmpeg
from dist_fusion.doctor.lines import FAIL, OK, WARN, Case, Line
from dist_fusion.engine.ops import is_built, wanted_ops, why_not_compiled
from dist_fusion.engine.sharding import ds_config, sharding

PYTHONS = SpecifierSet(">=3.11,<3.13")
SHOWN = ("torch", "torchvision", "triton", "deepspeed", "transformers", "timm")
STALE = 900.0
"""Seconds after which the lock of a build is nobody's: the longest build here takes two minutes."""


def python(case: Case) -> list[Line]:
    """The interpreter."""
    said = f"{platform.python_version()}, {sys.executable}"
    if platform.python_version() in PYTHONS:
        return [Line(OK, said)]
    return [Line(FAIL, said, "use Python 3.11 or 3.12")]


def packages(case: Case) -> list[Line]:
    """What dist-fusion needs is there, in versions that it can work with."""
    lines = []
    for needed in map(Requirement, requires("dist-fusion") or ()):
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            has = version(needed.name)
        except PackageNotFoundError:
            lines.append(Line(FAIL, f"{needed.name} is not installed", f"pip install '{needed}'"))
            continue
        if not needed.specifier.contains(has, prereleases=True):
            lines.append(Line(FAIL, f"{needed.name} {has} does not do ({needed})", f"pip install '{needed}'"))
    return lines or [Line(OK, ", ".join(f"{name} {version(name)}" for name in SHOWN if _installed(name)))]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def compiler(case: Case) -> list[Line]:
    """C++ and Python's headers: Triton's kernels, torch.compile and DeepSpeed's optimizer on the host need them."""
    wanted = [
        *(["Triton's kernels on a GPU"] if case.device.type == "cuda" else []),
        *(["compile: true"] if case.config and case.config.compile else []),
        *(f"DeepSpeed's {op}" for op in _lacking_ops(case)),
    ]
    lacking = [
        *([] if shutil.which(get_cxx_compiler()) else [f"no C++ compiler ({get_cxx_compiler()})"]),
        *([] if Path(sysconfig.get_path("include"), "Python.h").is_file() else ["no headers of Python (Python.h)"]),
    ]
    if not lacking:
        return [Line(OK, f"{get_cxx_compiler()} and the headers of Python")]
    remedy = "install g++ and python3-dev, load the cluster's module of a compiler, or use the container of docker/"
    if wanted:
        return [Line(FAIL, f"{', '.join(lacking)}; needed by {', '.join(wanted)}", remedy)]
    return [Line(WARN, f"{', '.join(lacking)}: needed on a GPU, and by compile: true", remedy)]


def deepspeed_ops(case: Case) -> list[Line]:
    """The operations of DeepSpeed's that the recipe loads."""
    if case.config is None:
        return [Line(OK, "which are needed, a recipe says (--recipe)")]
    wanted = _wanted_ops(case)
    if not wanted:
        return [Line(OK, f"deepspeed={case.config.deepspeed} needs none that is compiled")]
    lines = []
    for op in wanted:
        why = "" if is_built(op) else why_not_compiled(op)
        if why:
            lines.append(
                Line(FAIL, f"{op} cannot be compiled: {why}", "pip install ninja, or use zero2 without offload")
            )
        else:
            how = "built in" if is_built(op) else "compiled at its first use, in about a minute"
            lines.append(Line(OK, f"{op}: {how}"))
    return lines


def _wanted_ops(case: Case) -> tuple[str, ...]:
    return wanted_ops(sharding(ds_config(case.config, case.ranks))) if case.config else ()


def _lacking_ops(case: Case) -> list[str]:
    return [op for op in _wanted_ops(case) if not is_built(op)]


def builds(case: Case) -> list[Line]:
    """Locks that killed builds have left, for which the next start would wait in silence."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    lines = []
    for lock in sorted(root.rglob("lock")) if root.is_dir() else ():
        age = time.time() - lock.stat().st_mtime
        if age > STALE:
            said = f"{lock} is left of a build that was killed: the next start waits for it for ever"
            lines.append(Line(FAIL, said, f"rm {lock}"))
        else:
            lines.append(
                Line(WARN, f"{lock}: something is being compiled, or was when it was killed", "look again later")
            )
    return lines or [Line(OK, f"no lock in {root}")]


def ffmpeg(case: Case) -> list[Line]:
    """ffmpeg, which reads videos and what Pillow does not know."""
    path = find_ffmpeg()
    if path is None:
        said = "ffmpeg is not there: no frames of videos, no pictures that Pillow does not know"
        return [Line(WARN, said, "install ffmpeg, or pip install imageio-ffmpeg")]
    shown = subprocess.run([path, "-version"], capture_output=True, text=True, timeout=30, check=True).stdout
    found = re.match(r"ffmpeg version (\S+)", shown)
    return [Line(OK, f"{found[1] if found else 'of unknown version'}, {path}")]


def versions_of_code() -> dict[str, str]:
    """What all ranks must have alike, by name."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in SHOWN if _installed(name)},
        "CUDA": str(torch.version.cuda),
    }
