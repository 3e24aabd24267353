"""`attention_kl` beside the ways others compute it: loss and gradients of one distillation site.

The teacher is the student and a hundredth of noise, as late in a training, where it shows what was rounded before it
was subtracted. Errors are those of the gradients against float64.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dist_fusion.bench.timing import PEAKS, interleaved, quantiles, spread
from dist_fusion.kernels import attention_kl
from dist_fusion.kernels.choice import choose, place_of
from dist_fusion.kernels.reference import DIRECTIONS

HEADS, WIDTH = 12, 64
CAPTION = (10, 15)
"""Valid tokens of a text, [CLS] and [SEP] included; the rest of it is padding."""
FLOOR = -1e30


@dataclass(frozen=True)
class Site:
    """One distillation site's lengths: text tokens are padded, image tokens are not."""

    name: str
    pairs: int
    queries: int
    keys: int
    text: str  # which of the two are text: "queries" or "keys"


TRAINING = (Site("image to text, cut", 20, 50, 16, "keys"), Site("text to image, cut", 20, 16, 50, "queries"))
"""What a step of eight samples has: twenty pairs, texts cut to the batch's longest."""
SITES: dict[str, tuple[Site, ...]] = {
    "cpu": (*TRAINING, Site("image to text", 16, 50, 40, "keys")),
    "cuda": (
        Site("image to text", 256, 50, 40, "keys"),
        Site("text to image", 256, 40, 50, "queries"),
        Site("image to text, cut", 256, 50, 16, "keys"),
        Site("small batch", 32, 50, 40, "keys"),
        Site("384 pixels, image to text", 32, 577, 40, "keys"),
        Site("384 pixels, text to image", 32, 40, 577, "queries"),
    ),
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}
QUICK = Site("quick", 2, 20, 16, "keys")
ACTIVATION = 30_000_000
"""Bytes; beyond 32 MiB the C library always asks the system."""
SECONDS = {"cpu": 6.0, "cuda": 2.0}
"""Of one comparison, by kind of device."""


class Inputs(NamedTuple):
    """What every way is given; heads lie inside tokens, as projections leave them."""

    student_query: Tensor
    student_key: Tensor
    teacher_query: Tensor
    teacher_key: Tensor
    query_mask: Tensor
    key_mask: Tensor


class KernelRow(NamedTuple):
    """Ours beside another way at one site. Times are 20th, 50th and 80th percentiles of loss and gradients together."""

    case: str
    sizes: Mapping[str, object]
    ours: str  # which implementation
    ours_ms: list[float]
    peer: str
    peer_ms: list[float]
    ratio: float  # of the least times: above 1 ours is faster
    ratio_of_medians: float
    ours_kept_kb: float  # for the backward pass, beyond the inputs
    peer_kept_kb: float
    ours_peak_mb: float | None
    peer_peak_mb: float | None
    ours_gradient_error: float  # relative, of queries and keys together
    peer_gradient_error: float
    rounds: int

    def line(self) -> str:
        """The row for people."""
        return (
            f"{self.case:<46} {self.ratio:6.2f}x   {self.ours} {spread(self.ours_ms)} ms   {self.peer} "
            f"{spread(self.peer_ms)} ms   kept {self.ours_kept_kb:,.0f} to {self.peer_kept_kb:,.0f} kB   "
            f"gradients off by {self.ours_gradient_error:.0e} to {self.peer_gradient_error:.0e}"
        )


Way = Callable[[Inputs, str], Tensor]


def ours(given: Inputs, direction: str, impl: str = "auto") -> Tensor:
    """What training calls."""
    return attention_kl(
        *given[:4], query_mask=given.query_mask, key_mask=given.key_mask, direction=direction, impl=impl
    )


def eager(given: Inputs, direction: str) -> Tensor:
    """The usual published expression (arXiv:2112.08723), mended where it is not a number beside padding.

    That takes a finite floor for masked keys, and logarithms for both maps: where a probability is 0, `kl_div` of the
    probabilities has no gradient.
    """
    floor = FLOOR * (~given.key_mask).float()[:, None, None]
    scale = given.student_query.shape[-1] ** -0.5
    student, teacher = ((q @ k.mT * scale + floor).float().log_softmax(-1) for q, k in (given[:2], given[2:4]))
    of, towards = (teacher, student) if direction == "teacher-student" else (student, teacher)
    rows = F.kl_div(towards, of, reduction="none", log_target=True).sum(-1).mean(1)  # [P, M]
    return ((rows * given.query_mask).sum(-1) / given.query_mask.sum(-1)).mean()


def eager_fp32(given: Inputs, direction: str) -> Tensor:
    """The same in fp32."""
    return eager(
        given._replace(**{n: x.float() for n, x in zip(Inputs._fields[:4], given[:4], strict=True)}), direction
    )


def eager_autocast(given: Inputs, direction: str) -> Tensor:
    """The same under autocast: scores are rounded to half precision."""
    half = torch.float16 if given.student_query.dtype == torch.float16 else torch.bfloat16
    with torch.autocast(given.student_query.device.type, half):
        return eager(given, direction)


def attention_identity(given: Inputs, direction: str) -> Tensor:
    """Ordinary attention whose gradient is that of the KL; its value is not."""
    q, k, tq, tk, query_mask, key_mask = given
    scale, mask = q.shape[-1] ** -0.5, key_mask[:, None, None]
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask)
    if direction == "student-teacher":
        values = torch.cat([k, tk], -1).detach()
        rows = (attend(q, k, values) * torch.cat([scale * q, -scale * tq], -1).detach()).sum(-1).mean(1)
    else:
        towards = attend(q.detach(), k.detach(), k) - attend(tq, tk, k)
        rows = scale * (q * towards).sum(-1).mean(1)
    return ((rows.float() * query_mask).sum(-1) / query_mask.sum(-1)).mean()


def rows(device: torch.device, quick: bool) -> Iterator[KernelRow]:
    """All ways at all sites, in both directions.

    Before it, memory as large as a model's activations comes and goes: from then on the C library keeps what is freed,
    as it does in a training, where each way would else fetch its maps from the system anew, page by page.
    """
    torch.empty(ACTIVATION, dtype=torch.uint8)
    for site in (QUICK,) if quick else SITES[device.type]:
        torch._dynamo.reset()  # each site is compiled for its own sizes, as often as it takes
        for dtype in DTYPES[device.type]:
            given = inputs(site, dtype, device)
            for direction in DIRECTIONS:
                yield from _contest(site, given, direction, 0.0 if quick else SECONDS[device.type])


def ways(given: Inputs) -> dict[str, Way]:
    """Everybody by name; ours first."""
    chosen = choose(place_of(given[:4]))
    found: dict[str, Way] = {f"ours ({chosen})": ours}
    if given.student_query.is_cuda:
        others = (impl for impl in ("triton", "hybrid", "chunked") if impl != chosen)
        found |= {f"ours ({impl})": partial(ours, impl=impl) for impl in others}
    return found | {
        "reference": partial(ours, impl="reference"),
        "eager fp32": eager_fp32,
        "eager autocast": eager_autocast,
        "torch.compile autocast": torch.compile(eager_autocast, dynamic=False),
        "attention identity": attention_identity,
    }


def _contest(site: Site, given: Inputs, direction: str, seconds: float) -> Iterator[KernelRow]:
    dtype, device = given.student_query.dtype, given.student_query.device
    runs = {name: partial(gradients, way, given, direction) for name, way in ways(given).items()}
    taken = interleaved(runs, device, seconds)
    exact = gradients(partial(ours, impl="reference"), in_double(given), direction)
    first, *peers = runs
    peaks = {name: PEAKS[device.type](run) for name, run in runs.items()}
    held = {name: kept(way, given, direction) / 1e3 for name, way in ways(given).items()}
    errors = {name: error(run(), exact) for name, run in runs.items()}
    for peer in peers:
        yield KernelRow(
            case=f"{site.name}, {str(dtype).removeprefix('torch.')}, {direction}",
            sizes={"pairs": site.pairs, "heads": HEADS, "queries": site.queries, "keys": site.keys, "width": WIDTH},
            ours=first,
            ours_ms=quantiles(taken[first]),
            peer=peer,
            peer_ms=quantiles(taken[peer]),
            ratio=round(min(taken[peer]) / min(taken[first]), 3),
            ratio_of_medians=round(quantiles(taken[peer])[1] / quantiles(taken[first])[1], 3),
            ours_kept_kb=held[first],
            peer_kept_kb=held[peer],
            ours_peak_mb=peaks[first],
            peer_peak_mb=peaks[peer],
            ours_gradient_error=errors[first],
            peer_gradient_error=errors[peer],
            rounds=len(taken[first]),
        )


def inputs(site: Site, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Queries and keys of scores as large as late in a training, with text of real lengths."""
    draw = torch.Generator().manual_seed(0)

    def tensor(length: int) -> Tensor:
        return 3 * torch.randn(site.pairs, length, HEADS, WIDTH, generator=draw)

    student = [tensor(length) for length in (site.queries, site.keys)]
    teacher = [x + 0.01 * tensor(x.shape[1]) for x in student]
    lengths = torch.randint(CAPTION[0], CAPTION[1] + 1, (site.pairs, 1), generator=draw)
    masks = {name: torch.arange(size) < (lengths if site.text == name else size) for name, size in
             (("queries", site.queries), ("keys", site.keys))}  # fmt: skip
    tensors = (x.to(device, dtype).transpose(1, 2) for x in (*student, *teacher))
    return Inputs(*tensors, *(mask.expand(site.pairs, -1).to(device) for mask in masks.values()))


def in_double(given: Inputs) -> Inputs:
    """The same numbers in float64."""
    return given._replace(**{name: x.double() for name, x in zip(Inputs._fields[:4], given[:4], strict=True)})


def gradients(way: Way, given: Inputs, direction: str) -> tuple[Tensor, Tensor]:
    """Loss and gradients, from inputs that remember nothing."""
    query, key = (x.detach().requires_grad_() for x in given[:2])
    loss = way(given._replace(student_query=query, student_key=key), direction)
    found: tuple[Tensor, Tensor] = torch.autograd.grad(loss, (query, key))  # type: ignore[assignment]
    return found


def kept(way: Way, given: Inputs, direction: str) -> int:
    """Bytes that wait for the backward pass, without the inputs themselves, which are there anyway."""
    query, key = (x.detach().requires_grad_() for x in given[:2])
    known = {x.untyped_storage().data_ptr() for x in given}
    found: dict[int, int] = {}
    held = []

    def keep(x: Tensor) -> Tensor:
        held.append(x)  # so that no other takes its place
        if x.untyped_storage().data_ptr() not in known:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = way(given._replace(student_query=query, student_key=key), direction)
    assert loss.requires_grad
    return sum(found.values())


def error(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    """Relative distance of both gradients together."""
    off = sum(float((f.double() - e).square().sum()) for f, e in zip(found, exact, strict=True))
    return float((off / sum(float(e.square().sum()) for e in exact)) ** 0.5)
