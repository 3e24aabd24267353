import pytest
import torch

from dist_fusion.monitor.peaks import PEAKS, peak_flops


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("Tesla V100-SXM2-32GB", 125e12, 15.7e12),
        ("Tesla V100-PCIE-16GB", 112e12, 14e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
    ],
)
def test_the_peak_is_that_of_the_device_and_the_precision(name, half, single):
    assert peak_flops(name, torch.float16) == peak_flops(name, torch.bfloat16) == half
    assert peak_flops(name, torch.float32) == single


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090", "AMD Instinct MI300X", "NVIDIA A1000", ""])
def test_nothing_is_guessed_of_a_device_that_is_not_known(name):
    assert peak_flops(name, torch.float16) is None


def test_every_line_of_the_table_can_be_found():
    assert all(peak_flops(f"NVIDIA {name}", torch.float16) == peak.half for name, peak in PEAKS.items())
