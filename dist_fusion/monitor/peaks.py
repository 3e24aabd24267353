"""What GPUs could do at most: the measure of how well a run uses them."""

from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """Floating-point operations a second of dense matrix products."""

    half: float  # fp16 and, where there is any, bf16, on tensor cores
    single: float  # fp32; torch leaves TF32 off


PEAKS: dict[str, Peak] = {
    "H200": Peak(989e12, 67e12),
    "H100 PCIe": Peak(756e12, 51e12),
    "H100 NVL": Peak(835e12, 60e12),
    "H100": Peak(989e12, 67e12),
    "A100": Peak(312e12, 19.5e12),
    "A40": Peak(149.7e12, 37.4e12),
    "A30": Peak(165e12, 10.3e12),
    "A10": Peak(125e12, 31.2e12),
    "L40S": Peak(362e12, 91.6e12),
    "L4": Peak(121e12, 30.3e12),
    "T4": Peak(65e12, 8.1e12),
    "V100-PCIE": Peak(112e12, 14e12),
    "V100S": Peak(130e12, 16.4e12),
    "V100": Peak(125e12, 15.7e12),
}
"""By a part of the device's name, the longer before the shorter. Of NVIDIA's data sheets, without sparsity."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The peak of a device of this name for weights of this type; None if it is not in PEAKS."""
    words = device_name.replace("-", " ").split()
    for name, peak in PEAKS.items():
        wanted = name.replace("-", " ").split()
        if all(word in words for word in wanted):
            return peak.single if dtype == torch.float32 else peak.half
    return None
