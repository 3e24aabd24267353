"""Where a task stands among those of its job: what SLURM's variables say, or submitit's."""

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """One rank of a life of a job."""

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int
    first_host: str  # where rank 0 is
    life: str  # names the job, its step and how often it was started: no other life has this name

    def variables(self, port: int) -> dict[str, str]:
        """What `start_ranks` reads, where rank 0's store listens on `port`."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_ranks),
            "MASTER_ADDR": self.first_host,
            "MASTER_PORT": str(port),
        }


def of_task(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place of a task that srun started, or that submitit started without SLURM; None of any other process."""
    kind = without_slurm(environment)
    if kind == "local":
        rank, ranks = (int(environment[f"SUBMITIT_LOCAL_{name}"]) for name in ("GLOBALID", "NTASKS"))
        return Place(rank, ranks, rank, ranks, "127.0.0.1", f"local.{environment['SUBMITIT_LOCAL_JOB_ID']}")
    if kind == "debug":
        return Place(0, 1, 0, 1, "127.0.0.1", f"debug.{os.getpid()}")
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID")
        return Place(
            rank=int(environment["SLURM_PROCID"]),
            ranks=int(environment["SLURM_NTASKS"]),
            local_rank=int(environment["SLURM_LOCALID"]),
            local_ranks=tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"])),
            first_host=first_host(environment["SLURM_STEP_NODELIST"]),
            life=".".join([*(environment[name] for name in names), environment.get("SLURM_RESTART_COUNT", "0")]),
        )
    return None


def without_slurm(environment: Mapping[str, str] = os.environ) -> str:
    """`local` or `debug`, where submitit started this process without SLURM; nothing elsewhere.

    If that was done in a shell within a job, the job's variables are there, too, and say nothing of this process.
    """
    if environment.get("SUBMITIT_EXECUTOR") == "slurm":
        return ""
    return next((kind for kind in ("local", "debug") if f"SUBMITIT_{kind.upper()}_JOB_ID" in environment), "")


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes them: `rack[1-2]n[04,07-09],login` begins with rack1n04."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first, nodes
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0])


def tasks_of_node(tasks: str, node: int) -> int:
    """How many tasks a node of the step has, of a list as SLURM writes them: `8(x2),4` is 8, 8, 4."""
    counts: list[int] = []
    for part in tasks.split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[node]


def hostname() -> str:
    """This node's name, without its domain."""
    return socket.gethostname().split(".")[0]
