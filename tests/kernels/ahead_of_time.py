"""Compiles kernels to machine code without a GPU, and reads registers, spills and instructions off it.

Run as a program, without TRITON_INTERPRET: `python -m tests.kernels.ahead_of_time KERNEL CAPABILITY DTYPE name=value …`
prints one JSON object. The values fix the constants that a launch would fix.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dist_fusion.kernels import device

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
FLOATS = {"COEF", "SLOPE", "LOSS", "S_LOG", "OTHER", "FACTOR", "S", "T"}
CONSTANTS = {
    "WIDTH": 64, "PADDED": 64, "T_WIDTH": 64, "T_PADDED": 64, "TOWARDS_TEACHER": False, "GRADIENTS": True,
    "Q_MASKED": True, "K_MASKED": True, "MAPPED": False, "UPCAST": False, "BLOCK": 4096,
}  # fmt: skip


def compile_kernel(name: str, capability: int, dtype: str, warps: int, constants: dict[str, int]) -> dict[str, object]:
    """What the machine code of `name` uses, at a head width of 64 and with both masks unless `constants` say more."""
    kernel = getattr(device, name)
    signature, aligned, fixed = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        if argument.isupper() and argument in CONSTANTS | constants:
            signature[argument] = "constexpr"
            fixed[argument] = (CONSTANTS | constants)[argument]
        elif argument in ("QM", "KM"):
            signature[argument] = "*u8"
        elif argument == "HM":
            signature[argument] = "*i32"
        elif argument.isupper():
            signature[argument] = "*fp32" if argument in FLOATS else f"*{dtype}"
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif argument.endswith("_scale"):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if re.fullmatch(r"(sq|sk|tq|tk|dq|dk)_[phmn]", argument):
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, aligned)
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 1}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([TOOL, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    counts = Counter(re.findall(r"\b(HMMA|HGMMA|LDL|STL)\b", code))
    return {
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": made.metadata.shared,
        "tensor_core_products": counts["HMMA"] + counts["HGMMA"],
    }


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels cannot be compiled"
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.write(json.dumps({**order, **compile_kernel(**order)}) + "\n")
        sys.stdout.flush()
