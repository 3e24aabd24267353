"""What a host gives its ranks: cores, memory, files, a name that others find."""

import os
import re
import resource
import socket
from pathlib import Path

from dist_fusion.doctor import cgroups
from dist_fusion.doctor.lines import FAIL, OK, WARN, Case, Line, gigabytes
from dist_fusion.facts import saved_share

SHARED = Path("/dev/shm")
MEMORY = "proc/meminfo"
FILES = (256, 1024)
"""Open files below which a rank fails, or may: each loader worker keeps shards open, each batch on its way a few."""
LEAST_SHARED = 1e9
PREFETCHED = 2
"""Micro-batches that a loader worker has ready (torch's default)."""


def cores(case: Case) -> list[Line]:
    """Cores for a rank, its loader workers, and the thread that writes checkpoints."""
    mine = len(os.sched_getaffinity(0))
    if case.config is None:
        return [Line(OK, "{} for this process", "", (mine,))]
    wanted = 1 + case.config.data.num_workers
    sharing = case.here if mine == os.cpu_count() else 1  # ranks that are not bound share them all
    each = mine / sharing
    said, figures = f"{{}} for a rank, which is {wanted} processes with its loader workers", (each,)
    if each >= wanted or not case.config.data.num_workers:
        return [Line(OK, said, "", figures)]
    remedy = f"srun --cpus-per-task={wanted} (srun does not take it over from sbatch), or a smaller data.num_workers"
    return [Line(WARN, said, remedy, figures)]


def host_memory(case: Case) -> list[Line]:
    """Memory of the host, and what its ranks take of it while a checkpoint is written beside the steps."""
    free = available()
    if case.facts is None or case.config is None:
        return [Line(OK, "{} GB are free", "", (round(gigabytes(free)),))]
    copied = saved_share(case.facts, case.ranks) if case.config.save_async else 0.0
    needed = case.here * (copied + case.facts.memory.on_host)
    if case.device.type != "cuda":
        needed += case.here * case.facts.memory.on_device
    said = f"{{}} GB are free; {case.here} ranks take {gigabytes(needed):.2g} and some for loader workers"
    figures = (round(gigabytes(free)),)
    if needed > free:
        remedy = "save_async=false, no offload, fewer ranks on a host, or ask SLURM for all of it (--mem=0)"
        return [Line(FAIL, said, remedy, figures)]
    if needed > 0.7 * free:
        return [Line(WARN, said, "save_async=false, or ask SLURM for all of it (--mem=0)", figures)]
    return [Line(OK, said, "", figures)]


def available(root: Path = Path("/")) -> float:
    """Bytes that may still be taken: of the host, or of the control groups that this process is confined to."""
    told = re.search(r"MemAvailable:\s*(\d+) kB", (root / MEMORY).read_text())
    assert told, f"{root / MEMORY} does not tell what is available"
    return min(1024.0 * int(told[1]), cgroups.left(root))


def shared_memory(case: Case) -> list[Line]:
    """/dev/shm, through which loader workers hand over their batches; containers often have 64 MB of it."""
    space = os.statvfs(SHARED)
    size = float(space.f_frsize * space.f_bavail)
    needed = LEAST_SHARED
    if case.config is not None:
        model, micro = case.config.model, case.config.micro_batch(case.ranks)
        pictures = 4.0 * 3 * model.image_size**2 * micro * model.num_slots
        needed = 1.5 * case.here * case.config.data.num_workers * PREFETCHED * pictures
    said, figures = (
        f"{{}} GB are free in {SHARED}, loader workers take up to {gigabytes(needed):.2g} GB",
        (gigabytes(size),),
    )
    if size < needed:
        return [Line(FAIL if case.config else WARN, said, "docker run --ipc=host, or --shm-size=8g", figures)]
    return [Line(OK, said, "", figures)]


def open_files(case: Case) -> list[Line]:
    """How many files a process may hold open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few, enough = FILES
    said = f"{soft} at a time" if soft != resource.RLIM_INFINITY else "as many as one likes"
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return [Line(OK, said)]
    return [Line(FAIL if soft < few else WARN, said, f"ulimit -n {hard if hard > 0 else 65536} before the start")]


def name(case: Case) -> list[Line]:
    """Whether this host's name leads to it: gloo tells the other nodes to come there."""
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    if chosen:
        known = [interface for _, interface in socket.if_nameindex()]
        if not set(chosen.split(",")) & set(known):
            return [Line(FAIL, f"GLOO_SOCKET_IFNAME={chosen} is no interface here", f"there are {', '.join(known)}")]
        return [Line(OK, f"GLOO_SOCKET_IFNAME={chosen}")]
    host = socket.gethostname()
    several = case.ranks > case.here and "RANK" in os.environ
    grade = FAIL if several else WARN
    remedy = (
        "export GLOO_SOCKET_IFNAME= and NCCL_SOCKET_IFNAME= with the interface between the nodes (ip -brief address)"
    )
    try:
        address = str(socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0])
    except OSError as error:
        return [Line(grade, f"this host's name leads nowhere ({error.strerror}): gloo cannot meet others", remedy)]
    if address.startswith("127.") and several:
        return [Line(WARN, f"this host's name leads to {address}, where other nodes do not find it", remedy)]
    return [Line(OK, "it leads to this host")]
