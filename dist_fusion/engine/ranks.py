"""Starting and leaving a group of ranks."""

import os
import socket
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch.distributed import distributed_c10d

GROUPS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""By kind of device, what carries tensors between ranks."""
PATIENCE = timedelta(minutes=10)
"""How long ranks wait for one another, unless a run has its own limit."""


def on_gpu() -> bool:
    """Whether ranks run on GPUs: not if DS_ACCELERATOR=cpu says so, whatever the machine has."""
    name: str = get_accelerator().device_name()
    return name.startswith("cuda")


def start_ranks(patience: timedelta = PATIENCE) -> torch.device:
    """Join the process group that the launcher's five rank variables describe; returns this rank's device.

    A rank that waits for the others for longer than `patience` gives up.

    Without them this process is the only rank. The group has two ways: CPU tensors travel between the hosts by gloo,
    and those of GPUs by NCCL. Gloo finds the other nodes by their hosts' names; where a name leads nowhere,
    GLOO_SOCKET_IFNAME says which interface does.

    On a CPU DeepSpeed's shared-memory all-reduce is left out: its build takes a minute or two at first use, and a
    killed build leaves a lock that would hang the next start in silence.
    """
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    cuda = on_gpu()
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if not cuda and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores wait for one another: seconds a step where milliseconds do.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    # DeepSpeed adopts a group that is there; its own would be NCCL's alone. No `device_id`: with one, barriers go by
    # NCCL and wait for all that the GPU still has to do.
    torch.distributed.init_process_group(GROUPS[device.type], timeout=patience)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return device


def wait_at_most(patience: timedelta) -> None:
    """Have all groups wait that long: DeepSpeed makes its own, which would give up after torch's usual time."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(patience, group)


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def compute_alike(device: torch.device) -> None:
    """Have a GPU compute the same to the last bit every time; a CPU does, with as many threads.

    Operations that have no such form raise torch's error.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False


def stop_ranks() -> None:
    """Leave the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
