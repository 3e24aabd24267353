"""The group of ranks on a GPU. Two ranks on one GPU are refused by NCCL, so more of them need as many GPUs."""

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm

from dist_fusion import distributed
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.gpu


def test_tensors_of_the_host_and_of_the_gpu_each_have_a_way(device):
    group = dist.group.WORLD
    assert device.type == "cuda"
    assert group._get_backend(torch.device("cpu")).name() == "gloo"
    assert group._get_backend(device).name() == "nccl"
    for place in (torch.device("cpu"), device):
        values = torch.arange(3.0, device=place)
        dist.all_reduce(values)
        assert values.tolist() == [0, 1, 2]
    dist.barrier()


def test_deepspeed_adopts_the_group_that_is_there(device):
    assert comm.is_initialized()
    assert comm.get_world_size() == dist.get_world_size() == 1
    values = torch.ones(2, device=device)
    comm.all_reduce(values, group=comm.new_group([0]))
    assert values.tolist() == [1, 1]


def test_collectives_keep_tensors_where_they_are_and_wait_for_nothing(device):
    rows = torch.ones(3, 2, device=device, requires_grad=True)
    with no_waiting():
        assert distributed.on_any_rank(True, False) == [True, False]
        gathered, total = distributed.gather_rows(rows), distributed.summed(rows)
    assert gathered.device == total.device == device
    assert torch.equal(gathered, rows)
