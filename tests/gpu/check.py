"""`make gpu-check`: the tests marked `gpu` and then every bench, and one JSON of what they found.

    python -m tests.gpu.check [--device cpu --quick] [--tests PATH …] [--benches NAME …] [--seconds 510]

A part that fails, or takes more than its share of the time, is told in the JSON, and the next one goes on; what a part
leaves of its share is the later ones'. Any interpreter does that has the packages. Nothing is fetched.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch

from dist_fusion.bench.run import BENCHES, DEVICES

ROOT = Path(__file__).parents[2]
SECONDS = 510
"""For all parts together: with what is around them less than nine minutes."""
TESTS_SHARE = 3
"""Of the time, where each bench has 1."""
SAID = 3000
"""Characters of a part's last words that are kept if it does not pass."""
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "numpy", "webdataset", "pillow", "tokenizers")
ENDS = ("failure", "error", "skipped")
"""What pytest's report says of a test that did not pass."""


class Part(NamedTuple):
    """How one part went."""

    code: int | None  # None if it was stopped
    seconds: float
    said: str  # last words

    def told(self) -> dict[str, object]:
        """For the JSON."""
        if self.code == 0:
            return {"fate": "passed", "seconds": self.seconds}
        fate = "stopped: out of time" if self.code is None else f"failed with exit code {self.code}"
        return {"fate": fate, "seconds": self.seconds, "said": self.said}


def run(arguments: Sequence[str], device: str, limit: float) -> Part:
    """`python -m` with these arguments; it and all that it started are killed after so many seconds."""
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DS_ACCELERATOR": device}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, start_new_session=True,
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        code = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return Part(code, round(time.monotonic() - began, 1), output.read()[-SAID:])


def tests(paths: Sequence[str], device: str, limit: float) -> dict[str, object]:
    """The tests marked `gpu` in these paths: how many ended how, which did not pass, and the figures that they left."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        words = ["-m", "gpu", "--continue-on-collection-errors", f"--junitxml={report}"]
        part = run(["pytest", *words, *paths], device, limit)
        cases = [*ElementTree.parse(report).iter("testcase")] if report.exists() else []
    ended: dict[str, list[str]] = {end: [] for end in ("passed", *ENDS)}
    for case in cases:
        end = next((child.tag for child in case if child.tag in ENDS), "passed")
        ended[end].append(f"{case.get('classname')}::{case.get('name')}")
    return {
        **part.told(),
        **{end: len(names) for end, names in ended.items()},
        "not passed": ended["failure"] + ended["error"],
        "figures": {
            f"{case.get('name')}, {one.get('name')}": one.get("value")
            for case in cases
            for one in case.iter("property")
        },
    }


def bench(name: str, device: str, quick: bool, limit: float) -> dict[str, object]:
    """The rows of a bench; the last words of one that did not come to its end hold some, too."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = ["--device", device, "--json", str(file), *(["--quick"] if quick else [])]
        part = run(["dist_fusion", "bench", name, *options], device, limit)
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
    return {**part.told(), "rows": rows}


def installed(package: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; returns 0 if all passed, 1 if not, 2 if there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=DEVICES)
    parser.add_argument("--quick", action="store_true", help="benches only show that they run")
    parser.add_argument("--tests", nargs="*", default=["tests"], metavar="PATH")
    parser.add_argument("--benches", nargs="*", default=[*BENCHES], choices=[*BENCHES], metavar="NAME")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--results", type=Path, default=ROOT / "tests" / "results", help="where the JSON goes")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu-check: torch sees no GPU here; --device cpu --quick shows that the parts run\n")
        return 2
    name = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    began, today = time.monotonic(), datetime.now(UTC).date().isoformat()
    found: dict[str, object] = {
        "device": name,
        "date": today,
        "quick": given.quick,
        "versions": {"python": sys.version.split()[0], **{package: installed(package) for package in PACKAGES}},
        "parts": (parts := {}),
    }
    file = given.results / f"{name.lower().replace(' ', '-')}-{today}.json"
    shares = {"tests": TESTS_SHARE, **dict.fromkeys(given.benches, 1)}
    for part in [*shares]:
        left = given.seconds - (time.monotonic() - began)
        limit = max(0.0, left) * shares[part] / sum(shares.values())
        del shares[part]
        if part == "tests":
            parts[part] = tests(given.tests, given.device, limit)
        else:
            parts[part] = bench(part, given.device, given.quick, limit)
        sys.stdout.write(f"{part}: {parts[part]['fate']}, {parts[part]['seconds']} s of {limit:.0f}\n")
        sys.stdout.flush()
        file.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"{file}\n")
    return 0 if all(one["fate"] == "passed" for one in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
