"""What only a GPU shows of the kernels. `test_impls.py` runs there, too."""

import pytest
import torch

from dist_fusion.bench.kernels import Site, eager_autocast, error, gradients, in_double, inputs, ours
from dist_fusion.kernels import IMPLS, attention_kl
from dist_fusion.kernels.reference import DIRECTIONS
from tests.gpu.waiting import no_waiting

pytestmark = pytest.mark.gpu
OURS = [name for name, impl in IMPLS.items() if impl and impl.needs_triton]
SITE = Site("training", 64, 50, 40, "keys")


def given(dtype=torch.bfloat16):
    return inputs(SITE, dtype, torch.device("cuda"))


@pytest.mark.parametrize("from_above", [1.0, 65536.0])
@pytest.mark.parametrize("impl", OURS)
def test_the_host_never_waits_for_loss_or_gradients(impl, from_above):
    x = given(torch.float16)
    query, key = (y.clone().requires_grad_() for y in x[:2])
    factor = torch.tensor(from_above, device="cuda")

    def step():
        masks = {"query_mask": x.query_mask, "key_mask": x.key_mask}
        loss = attention_kl(query, key, *x[2:4], **masks, head_map=tuple(range(12)), impl=impl)
        (loss * factor).backward()

    step()  # compiles
    with no_waiting():
        step()


@pytest.mark.parametrize("impl", OURS)
def test_a_captured_graph_replays_the_same_numbers(impl):
    x = given()
    expected = gradients(lambda y, d: ours(y, d, impl), x, "teacher-student")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        gradients(lambda y, d: ours(y, d, impl), x, "teacher-student")
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(lambda y, d: ours(y, d, impl), x, "teacher-student")
    for gradient in found:
        gradient.fill_(float("nan"))  # what is not written again shows
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("impl", OURS)
def test_at_training_size_gradients_are_ten_times_better_than_autocasts(impl, direction):
    x = given()
    exact = gradients(ours, in_double(x), direction)
    usual = error(gradients(eager_autocast, x, direction), exact)
    assert error(gradients(lambda y, d: ours(y, d, impl), x, direction), exact) <= min(4e-3, usual / 10)


def test_the_gradients_are_all_that_stays_in_memory():
    x = given()
    query, key = (y.clone().requires_grad_() for y in x[:2])
    attention_kl(query, key, *x[2:4], key_mask=x.key_mask)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = attention_kl(query, key, *x[2:4], key_mask=x.key_mask)
    assert loss.requires_grad
    assert torch.cuda.memory_allocated() - before <= 2 * (query.numel() + key.numel()) + 4096
