"""`dist-fusion doctor`: whether this machine, or all nodes of a job, can train; and if not, the remedy.

    dist-fusion doctor [--recipe RECIPE …]                        this host
    torchrun --nproc-per-node 8 -m dist_fusion.doctor             the same on every rank, and what is between them
    python -m launcher doctor --cluster slurm/v100.yaml           on every node of a job

Exit codes: 0 nothing is red; 1 something is; 2 the user's mistake.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Examine as `arguments` say (those of the command line if None); returns the exit code. Collective.

    What is not installed well cannot be examined: then the error is the only line.
    """
    try:
        from dist_fusion.doctor import examination
    except Exception as error:
        sys.stdout.write(
            f"FAIL  install         {type(error).__name__}: {error}\n"
            f"{'':22}→ install requirements.lock into a new environment (make .venv/ready)\n"
        )
        return 1
    return examination.main(sys.argv[1:] if arguments is None else arguments)
