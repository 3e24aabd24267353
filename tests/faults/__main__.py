"""`make faults`: all that may happen to a run, and a table of what was found; kept in tests/results/."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from dist_fusion.checkpoint.folder import versions

ROOT = Path(__file__).parents[2]
COLUMNS = {"case": 62, "found": 40, "resumed_from": 13, "repeated": 9, "digest": 24}


def main() -> int:
    """Run everything; the exit code is pytest's."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "faults.jsonl"
        lines.touch()
        command = [sys.executable, "-m", "pytest", "tests/faults", "-m", "faults or not faults", "--tb=short"]
        code = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "DIST_FUSION_FAULTS": str(lines), "OMP_NUM_THREADS": "1"}
        ).returncode
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
    sys.stdout.write("".join(f"{name:<{width}}" for name, width in COLUMNS.items()) + "\n")
    for row in rows:
        sys.stdout.write("".join(f"{row[name]!s:<{width}}" for name, width in COLUMNS.items()).rstrip() + "\n")
    today = datetime.now(UTC).date().isoformat()
    result = {
        "what": "make faults", "machine": platform.processor() or platform.machine(), "versions": versions(),
        "date": today, "seconds": round(time.monotonic() - began), "passed": code == 0, "rows": rows,
    }  # fmt: skip
    path = ROOT / "tests" / "results" / f"faults-cpu-{today}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    sys.stdout.write(f"{len(rows)} cases in {result['seconds']} s; {path.relative_to(ROOT)}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
