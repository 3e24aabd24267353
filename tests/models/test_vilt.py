import pytest
import torch

from dist_fusion.models.layers import Encoder
from tests import tiny

ITM = {"itm": tiny.PRETRAINING["itm"]}


@pytest.fixture
def batch():
    return tiny.batch(tiny.TEACHING, tiny.samples(8))


def test_only_the_rows_that_a_head_reads_are_finished_in_the_last_block(batch):
    for tasks, finished in ((ITM, 1), (tiny.TEACHING, batch.text_ids.shape[1]), ({}, 1)):
        teacher, seen = tiny.model(tiny.model_config("fusion-encoder"), tasks), []
        teacher.encoder.blocks[-1].feed.register_forward_hook(
            lambda _, given, out, seen=seen: seen.append(out.shape[1])
        )
        taps = teacher(batch).taps
        assert seen == [finished]
        assert taps["i2t"].query.shape[2] == taps["t2i"].key.shape[2] == 5  # of all rows, as ever


def test_a_teacher_that_finishes_fewer_rows_says_and_learns_the_same(batch):
    few, many = (tiny.model(tiny.model_config("fusion-encoder"), tasks).double() for tasks in (ITM, tiny.TEACHING))
    many.load_state_dict(few.state_dict(), strict=False)
    outputs = [model(batch) for model in (few, many)]
    torch.testing.assert_close(outputs[0].logits["itm"], outputs[1].logits["itm"])
    for site, tap in outputs[0].taps.items():
        assert torch.equal(tap.query, outputs[1].taps[site].query)
        assert torch.equal(tap.key, outputs[1].taps[site].key)
    for output in outputs:
        output.logits["itm"].square().sum().backward()
    theirs = dict(many.named_parameters())
    for name, parameter in few.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad)


@pytest.mark.parametrize("read", [slice(None, 1), slice(2, 5), slice(4, None)])
def test_rows_finished_alone_are_those_finished_with_all_others(read):
    torch.manual_seed(0)
    encoder = Encoder(16, 2, 3, 0.0).double()
    x = torch.randn(4, 7, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 3:6] = False
    alone, among = encoder(x, mask, read=read), encoder(x, mask)
    torch.testing.assert_close(alone.hidden[-1], among.hidden[-1][:, read])
    assert torch.equal(alone.query, among.query)
    assert torch.equal(alone.key, among.key)
    parameters = (x, *encoder.parameters())
    gradients = [
        torch.autograd.grad(rows.square().sum(), parameters) for rows in (alone.hidden[-1], among.hidden[-1][:, read])
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
