import pytest
import torch

from dist_fusion.distill import DistillConfig, objective, row_weights
from dist_fusion.models.execution import Aside, set_execution
from dist_fusion.models.fusion import FUSIONS
from tests import tiny


def step(fusion: str = "bridge-pre", dropout: float = 0.0, layers: int = 2, *, kind: str = "dual-encoder", **execution):
    """The loss, the gradients and the bytes kept for the backward pass of one step, set up by `execution`."""
    tasks = tiny.PRETRAINING if kind == "dual-encoder" else tiny.TEACHING
    size = {"num_layers": layers, "num_fusion_layers": layers}
    model = tiny.model(tiny.model_config(kind, fusion=fusion, dropout=dropout, **size), tasks)
    names = list(model.state_dict())
    set_execution(model, **{"activation_checkpointing": False, "compile": False} | execution)
    assert list(model.state_dict()) == names
    batch = tiny.batch(tasks, tiny.samples(8))
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(batch)
    loss = objective(DistillConfig(), tasks, batch, output, (), row_weights([batch], tasks)).total
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_checkpointed_layers_give_the_same_loss_and_gradients_with_dropout_and_keep_less(fusion):
    loss, gradients, kept = step(fusion, dropout=0.3)
    again, same, kept_less = step(fusion, dropout=0.3, activation_checkpointing=True)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same[name]), name
    assert kept_less < 0.6 * kept


def test_a_fusion_encoder_can_be_checkpointed_too():
    loss, _, kept = step(kind="fusion-encoder", dropout=0.3)
    again, _, kept_less = step(kind="fusion-encoder", dropout=0.3, activation_checkpointing=True)
    assert torch.equal(loss, again)
    assert kept_less < 0.6 * kept


@pytest.mark.launch
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_compiled_towers_and_fusion_give_the_same_loss_and_gradients(activation_checkpointing):
    """By the tracer and its backward pass, without the code generator, which takes minutes on a CPU."""
    loss, gradients, _ = step(layers=1)
    execution = {"activation_checkpointing": activation_checkpointing, "compile": True, "backend": "aot_eager"}
    again, same, _ = step(layers=1, **execution)
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, msg=name)


@pytest.mark.parametrize("wanted", [False, True])
def test_on_a_cpu_nothing_runs_aside(wanted):
    """A recipe for GPUs runs there as it is."""
    aside = Aside(torch.device("cpu"), wanted)
    for value in (1.0, 2.0):
        with aside:
            x = torch.full((3,), value)
        assert aside.joined(x) is x
        assert torch.equal(x, torch.full((3,), value))
