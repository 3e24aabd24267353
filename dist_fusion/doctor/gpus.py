"""GPUs: whether there are any, whether torch has code for them, and what they can compute in."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from dist_fusion.doctor.lines import FAIL, OK, WARN, Case, Line
from dist_fusion.engine.ranks import on_gpu
from dist_fusion.engine.sharding import BF16_CAPABILITY, check_device, ds_config
from dist_fusion.schema import UserError

DRIVER = Path("/proc/driver/nvidia/version")
DEVICES = "nvidia[0-9]*"
VOLTA = (7, 0)
NEEDED = 0.9
"""Share of a GPU's memory that an estimate may fill: what CUDA and NCCL keep for themselves is not in it."""


def driver(case: Case) -> list[Line]:
    """The driver and the CUDA that torch was built for."""
    built = f"torch {torch.__version__} for CUDA {torch.version.cuda}"
    found = re.search(r"Kernel Module\D*([\d.]+)", DRIVER.read_text()) if DRIVER.exists() else None
    number = f"driver {found[1]}, " if found else ""
    if torch.cuda.is_available():
        if not on_gpu():
            return [Line(WARN, f"{number}{built}; DS_ACCELERATOR=cpu hides the GPUs", "unset DS_ACCELERATOR")]
        return [Line(OK, f"{number}{built}")]
    if not any(Path("/dev").glob(DEVICES)):
        return [Line(OK, f"no NVIDIA device: ranks run on the CPU ({built})")]
    remedy = (
        "look whether CUDA_VISIBLE_DEVICES hides them, and whether nvidia-smi works (in a container: docker run --gpus "
        "all, apptainer exec --nv); if it does, the driver is too old for this CUDA: update it, or install a torch for "
        "an older one (PyTorch's index cu126)"
    )
    return [Line(FAIL, f"{number}there are NVIDIA devices, and {built} cannot use them", remedy)]


def kernels(case: Case) -> list[Line]:
    """For each kind of GPU, whether torch has machine code for it; those of this rank multiply matrices."""
    built = _built()
    if not torch.cuda.is_available():
        volta = "with" if has_kernels(built, VOLTA) else "without"
        return [Line(OK, f"torch has code for {' '.join(built) or 'CPUs alone'} ({volta} V100)")]
    lines, counts = [], dict[tuple[str, tuple[int, int], float], list[int]]()
    for number in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(number)
        key = known.name, (known.major, known.minor), round(known.total_memory / 2**30, 1)
        counts.setdefault(key, []).append(number)
    for (name, capability, memory), numbers in counts.items():
        said = f"{len(numbers)} × {name}, {memory} GiB, compute capability {_dotted(capability)}"
        if not has_kernels(built, capability):
            lines.append(
                Line(FAIL, f"{said}, for which this torch has no code ({' '.join(built)})", remedy(capability))
            )
            continue
        for number in set(numbers) & set(tried(torch.cuda.device_count())):
            square = torch.ones(64, 64, device=f"cuda:{number}", dtype=torch.float16)
            assert (square @ square).sum().item() == 64**3, f"GPU {number} multiplies wrongly"
        lines.append(Line(OK, said))
    return lines


def tried(count: int, environment: Mapping[str, str] = os.environ) -> Sequence[int]:
    """Of so many GPUs those that this process computes on: all when alone, among other ranks its own.

    That takes memory of a GPU, and is refused where another process has it to itself (compute mode EXCLUSIVE_PROCESS).
    """
    if int(environment.get("WORLD_SIZE", "1")) == 1:
        return range(count)
    return [int(environment["LOCAL_RANK"]) % count]


def _built() -> list[str]:
    """What torch has code for, also where there is no GPU: then torch.cuda.get_arch_list() is empty."""
    return (torch._C._cuda_getArchFlags() or "").split() if torch.version.cuda else []


def has_kernels(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `sm_XY` or `compute_XY` runs on a GPU of this compute capability.

    Machine code runs on its own major number from its minor number on, PTX on all that is later (CUDA C++ Programming
    Guide, "Binary Compatibility", "PTX Compatibility").
    """
    for flag in built:
        kind, _, number = flag.partition("_")
        digits = re.match(r"\d+", number)
        if not digits:
            continue
        of = int(digits[0][:-1]), int(digits[0][-1])
        if number.endswith("a"):  # of one capability alone
            fits = of == capability
        else:
            fits = of <= capability if kind == "compute" else of[0] == capability[0] and of[1] <= capability[1]
        if fits:
            return True
    return False


def remedy(capability: tuple[int, int]) -> str:
    """Which torch to install for GPUs that this one has no code for."""
    if capability == VOLTA:
        return (
            "torch 2.10 is the last whose default wheel has code for V100: pip install torch==2.10.0 "
            "torchvision==0.25.0 (as requirements.lock has it), or a later one from PyTorch's index cu126"
        )
    if capability < VOLTA:
        return "GPUs before V100 are not supported; ranks can run on the CPU with DS_ACCELERATOR=cpu"
    return f"install a newer torch, built for sm_{capability[0]}{capability[1]}"


def precision(case: Case) -> list[Line]:
    """What GPUs compute in, by their compute capability, and whether the recipe asks for that."""
    lines = []
    if case.config is not None:
        try:
            check_device(case.config, ds_config(case.config, case.ranks), case.device)
        except UserError as error:
            there = "" if case.device.type == "cuda" else "; on a login node ask the nodes: python -m launcher doctor"
            return [Line(FAIL, str(error), f"choose another deepspeed= (see ds_configs/){there}")]
        lines.append(Line(OK, f"deepspeed={case.config.deepspeed} suits {_device(case.device)}"))
    if case.device.type != "cuda":
        return lines or [Line(OK, "fp32 alone, on the CPU")]
    capability = torch.cuda.get_device_capability(case.device)
    if capability >= BF16_CAPABILITY:
        lines.append(Line(OK, "fp16 and bf16"))
    else:
        lies = ", though torch.cuda.is_bf16_supported() says so" if torch.cuda.is_bf16_supported() else ""
        lines.append(Line(OK, f"fp16 (-fp16 of ds_configs); no bf16 at compute capability {_dotted(capability)}{lies}"))
    return lines


def memory(case: Case) -> list[Line]:
    """Whether a rank of the recipe fits its GPU, by an estimate."""
    if case.facts is None or case.device.type != "cuda":
        return [Line(OK, "what is needed, a recipe says (--recipe), on a GPU")]
    total = torch.cuda.get_device_properties(case.device).total_memory
    free, _ = torch.cuda.mem_get_info(case.device)
    needed = case.facts.memory.on_device
    said, figures = "a rank takes {} GiB by estimate, its GPU has {}, of which {} are free", (needed, total, free)
    less = "activation_checkpointing=true, a larger accumulation, zero2 or zero3 for zero1, or more ranks"
    in_gib = tuple(round(size / 2**30, 1) for size in figures)
    if needed > total:
        return [Line(FAIL, said, less, in_gib)]
    if needed > NEEDED * total:
        return [Line(WARN, f"{said}: that is tight", less, in_gib)]
    if needed > free:
        return [Line(WARN, f"{said}: somebody else uses it", "see nvidia-smi", in_gib)]
    return [Line(OK, said, "", in_gib)]


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
