"""What is between the ranks: their hosts, a shared disk, clocks, and how fast tensors travel. All are collective.

A rank that raised between two collectives would leave the others waiting. So what may fail on one rank alone is
guarded there, and its lines travel with the rest.
"""

import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path

import torch

import dist_fusion
from dist_fusion import distributed
from dist_fusion.doctor.lines import FAIL, OK, WARN, Case, Line, guarded
from dist_fusion.doctor.software import versions_of_code

SEEN_WITHIN = 10.0
"""Seconds after which a file that another node has written must show."""
SKEW = 2.0
"""Seconds by which clocks of hosts may differ: files are compared by their times, and logs are read together."""
ROUNDS = 5
BYTES = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Of the tensors that measure how fast ranks exchange them."""
EXPECTED = {"cpu": (0.1, 20.0), "cuda": (1.0, 2.0)}
"""Gigabytes a second and milliseconds that are worse than any network for training has: gloo's and NCCL's."""
USUAL = {
    "cpu": "gloo: 0.3 to 3 GB/s, 0.05 to 1 ms",
    "cuda": "NCCL: 100 GB/s and more by NVLink, 5 to 20 by PCIe, 10 by InfiniBand of 100 Gbit/s, 1 by Ethernet of 10",
}
"""By data sheets and experience, not measured here."""


def ranks(case: Case) -> list[Line]:
    """Where the ranks are, whether each has a GPU of its own, and whether all run the same code."""
    mine = socket.gethostname(), _gpu(case), versions_of_code(), _digest(Path(dist_fusion.__file__).parent)
    everyone = distributed.gathered(mine)
    hosts = Counter(host for host, *_ in everyone)
    counts = ", ".join(f"{host} {count}" for host, count in sorted(hosts.items())[:4])
    more = f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else ""
    lines = [Line(OK, f"{len(everyone)} on {len(hosts)} hosts: {counts}{more}")]
    shared = Counter((host, gpu) for host, gpu, *_ in everyone if gpu)
    if any(count > 1 for count in shared.values()):
        (host, _), count = shared.most_common(1)[0]
        lines.append(Line(FAIL, f"{count} ranks share a GPU on {host}", "ask for as many GPUs as tasks on each node"))
    if len(set(hosts.values())) > 1:
        lines.append(Line(WARN, "hosts have unequal numbers of ranks", "the same --ntasks-per-node on every node"))
    for name in everyone[0][2]:
        found = {versions.get(name, "none") for *_, versions, _ in everyone}
        if len(found) > 1:
            said = f"ranks have different versions of {name}: {', '.join(sorted(found))}"
            lines.append(Line(FAIL, said, "the same environment on all nodes: on a shared disk, or in a container"))
    if len({digest for *_, digest in everyone}) > 1:
        lines.append(
            Line(FAIL, "ranks have different code of dist_fusion", "the same folder or container on all nodes")
        )
    return lines


def _gpu(case: Case) -> str:
    return str(torch.cuda.get_device_properties(case.device).uuid) if case.device.type == "cuda" else ""


def _digest(folder: Path) -> str:
    """Of all code below a folder."""
    return sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))).hexdigest()


def shared_folder(case: Case, patience: float = SEEN_WITHIN) -> list[Line]:
    """Whether all ranks write into the folder of the run, and see what the others have written."""
    count, rank = distributed.world_size(), distributed.rank()
    place = Path(distributed.from_first(str(case.folder.absolute() / f".doctor-{os.getpid()}-{time.time_ns()}")))
    lines: list[Line] = []
    late = 0.0
    with guarded(lines):
        if rank == 0:
            place.mkdir()
    distributed.barrier()
    with guarded(lines):
        if not _soon(place.is_dir, patience):
            lines.append(_unseen(f"{place.parent} of rank 0 is not the one that is here"))
        else:
            (place / f"rank-{rank}").write_text(str(rank))
    distributed.barrier()
    began = time.monotonic()
    with guarded(lines):
        lacking = [other for other in range(count) if not _soon(partial(_wrote, place, other), patience)]
        late = time.monotonic() - began
        if lacking and not lines:
            lines.append(_unseen(f"{place.parent}: what {len(lacking)} other ranks write is not seen here"))
    distributed.barrier()
    with suppress(OSError):  # what is left lies in a hidden folder, and harms nobody
        if rank == 0:
            shutil.rmtree(place)
    return lines or [Line(OK, f"{place.parent}: all see what any writes, in {{}} s", "", (round(late, 2),))]


def _wrote(place: Path, rank: int) -> bool:
    path = place / f"rank-{rank}"
    return path.is_file() and path.read_text() == str(rank)


def _soon(seen: Callable[[], bool], patience: float) -> bool:
    end = time.monotonic() + patience
    while not seen():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _unseen(said: str) -> Line:
    return Line(FAIL, said, "put the run's folder (runs=) on a file system that all nodes share")


def clocks(case: Case) -> list[Line]:
    """Whether the hosts agree on the time."""
    spread = float("inf")
    for _ in range(3):  # a rank that wakes late looks like a clock that is ahead
        distributed.barrier()
        times = distributed.gathered(time.time())
        spread = min(spread, max(times) - min(times))
    if spread > SKEW:
        return [Line(WARN, "they differ by {} s", "let all hosts keep time by NTP (chrony)", (round(spread, 1),))]
    return [Line(OK, f"they differ by less than {SKEW:.0f} s")]


def exchange(case: Case) -> list[Line]:
    """How fast ranks sum tensors: between the hosts by gloo, and between GPUs by NCCL."""
    kinds = ["cpu", *(["cuda"] if case.device.type == "cuda" else [])]
    return [_exchange(case, torch.device(kind) if kind == "cpu" else case.device) for kind in kinds]


def _exchange(case: Case, device: torch.device) -> Line:
    size, links = BYTES[device.type], 2 * (distributed.world_size() - 1) / distributed.world_size()
    latency = _seconds(torch.zeros(1, device=device)) * 1e3
    # What a link carries, whatever the number of ranks: a ring sends so much of the tensor over each.
    rate = links * size / _seconds(torch.zeros(size // 4, device=device)) / 1e9
    measured = distributed.gathered((rate, latency))
    rate, latency = min(one for one, _ in measured), max(one for _, one in measured)
    least, longest = EXPECTED[device.type]
    figures: tuple[float, ...] = (rate, latency)
    said = f"{{}} GB/s a link, {{}} ms for one number (usual for {USUAL[device.type]})"
    if case.facts is not None and device.type == case.device.type:
        gradients = sum(part.parameters for part in case.facts.student.values()) * case.facts.sharding.dtype.itemsize
        said, figures = f"{said}; the gradients of a step take {{}} s", (*figures, links * gradients / rate / 1e9)
    if rate < least or latency > longest:
        remedy = (
            "the ranks may talk over a slow interface: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name a better one; "
            "NCCL_DEBUG=INFO tells what NCCL takes"
        )
        return Line(WARN, said, remedy, figures)
    return Line(OK, said, "", figures)


def _seconds(tensor: torch.Tensor) -> float:
    """The fastest of some sums of `tensor` over all ranks, after one to warm up."""
    best = float("inf")
    for turn in range(1 + ROUNDS):
        distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        if tensor.device.type == "cuda":
            torch.cuda.synchronize(tensor.device)
        if turn:
            best = min(best, time.perf_counter() - began)
    return best
