"""DeepSpeed's compiled operations, as far as a run asks for them."""

from deepspeed import git_version_info
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.all_ops import ALL_OPS
from torch.utils.cpp_extension import is_ninja_available

from dist_fusion.engine.sharding import Sharding

HOST_ADAM = "cpu_adam"


def wanted_ops(sharding: Sharding) -> tuple[str, ...]:
    """The operations that training so loads: AdamW on the host is DeepSpeed's own, on a device it is torch's."""
    return (HOST_ADAM,) if sharding.offload else ()


def is_built(op: str) -> bool:
    """Whether DeepSpeed was installed with this operation for what ranks run on; else its first use compiles it."""
    ours = git_version_info.accelerator_name == get_accelerator()._name
    return ours and bool(git_version_info.installed_ops.get(op))


def why_not_compiled(op: str) -> str:
    """What is in the way of compiling an operation here, besides a compiler; nothing if nothing is."""
    if not is_ninja_available():
        return "ninja is not installed"
    builder = ALL_OPS.get(op)
    if builder is None or not builder.is_compatible(verbose=False):
        return "DeepSpeed finds this machine unfit for it"
    return ""
