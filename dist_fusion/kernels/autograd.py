"""Gradients found in the forward pass, handed out in the backward pass (as Liger Kernel does, arXiv:2410.10989).

A loss that is a sum over rows knows its gradients up to one factor, the gradient that comes from above. So they are
found with the loss, while the rows are at hand, and kept in the inputs' type in place of any map. In bf16 and fp32
they are kept ready for a factor of 1, and where it is 1 nothing is left to do. In fp16 they are kept per row, since a
mean over all rows of a batch is too small for its range; the factor then carries pair weights and loss scale.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from dist_fusion.kernels.problem import Problem, Solve


class Impl(NamedTuple):
    """One way to solve a problem, and to scale its gradients afterwards."""

    solve: Solve
    rescale: Callable[[Tensor, Tensor, bool], Tensor]  # (kept, factor, may it be changed) -> kept * factor
    needs_triton: bool


class Solved(torch.autograd.Function):
    """The loss of a problem, with the gradients of the student's queries and keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, problem: Problem, impl: Impl, gradients: bool) -> Tensor:
        """`query` and `key` are the problem's own, named once more for autograd to see them."""
        per_row = query.dtype == torch.float16
        slope = torch.ones_like(problem.coefficient) if per_row else problem.coefficient
        found = impl.solve(problem._replace(slope=slope), gradients)
        if found.query_gradient is not None and found.key_gradient is not None:
            kept = (found.query_gradient, found.key_gradient)
            ctx.save_for_backward(*kept, *([problem.coefficient] if per_row else []))
            ctx.rescale = impl.rescale
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, from_above: Tensor) -> tuple[Tensor | None, ...]:
        query_gradient, key_gradient, *coefficient = ctx.saved_tensors
        factor = from_above * coefficient[0][:, None, None, None] if coefficient else from_above
        # A graph that is kept is gone through again, and must find them as they are.
        may_change = not torch._C._autograd._get_current_graph_task_keep_graph()
        wanted = zip((query_gradient, key_gradient), ctx.needs_input_grad[:2], strict=True)
        return *(ctx.rescale(kept, factor, may_change) if want else None for kept, want in wanted), None, None, None


@_disable_dynamo  # torch.compiler.disable, except that it loads the compiler at the first call and not here
def solved(problem: Problem, query: Tensor, key: Tensor, impl: Impl) -> Tensor:
    """The loss of `problem`, for autograd a function of its student's `query` and `key`.

    Compilers do not look inside: there is nothing to fuse with, and they would trace the interpreter of the kernels.
    """
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    with torch.autocast(query.device.type, enabled=False):
        return Solved.apply(query, key, problem, impl, gradients)
