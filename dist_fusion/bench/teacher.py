"""Our ViLT as a teacher beside transformers' ViltModel: the same weights, images and texts in both.

What counts is what distillation reads: the logits of the teacher's heads, and its last block's attention. Ours shows
queries and keys; transformers shows attention maps, of all blocks or of none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import transformers

from dist_fusion.batch import PairBatch, answers_to
from dist_fusion.bench.captions import VOCABULARY, captioned
from dist_fusion.bench.hugging_face import Peer, build_pair, check_agreement
from dist_fusion.bench.timing import Contest, Row, Run, compare
from dist_fusion.models.config import ModelConfig
from dist_fusion.models.heads import READ_TOKENS
from dist_fusion.models.teachers import Teacher, teach
from dist_fusion.models.vilt import Vilt
from dist_fusion.types import Batch, HeadSpec, Output, to_device

HEADS = {"itm": HeadSpec("linear", 2), "mlm": HeadSpec("token", VOCABULARY.size)}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far outputs may be from transformers' in fp32; the norms' epsilons differ (1e-6 and 1e-12)."""


@dataclass(frozen=True)
class Case:
    """How each side runs."""

    name: str
    ours: torch.dtype
    theirs: torch.dtype
    heads: tuple[str, ...] = ("itm",)
    pad_multiple: int = 40  # of our texts; transformers' processor pads to all 40 positions


CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case("like for like, fp32", torch.float32, torch.float32),
        Case("like for like, bf16", torch.bfloat16, torch.bfloat16),
        Case("like for like, bf16, word head", torch.bfloat16, torch.bfloat16, heads=("itm", "mlm")),
        Case("as people run it", torch.bfloat16, torch.float32, pad_multiple=8),
    ),
    "cuda": (
        Case("like for like, fp16", torch.float16, torch.float16),
        Case("like for like, fp16, word head", torch.float16, torch.float16, heads=("itm", "mlm")),
        Case("as people run it", torch.float16, torch.float32, pad_multiple=8),
    ),
}
"""By kind of device. "Like for like" is the same precision and the same padding; "as people run it" is transformers in
fp32 with every text padded, and ours in half precision with texts cut to the batch's longest."""


@dataclass(frozen=True)
class Size:
    """How large the comparison is."""

    model: ModelConfig
    pairs: int
    seconds: Mapping[str, float]  # a case, by kind of device


FULL = Size(ModelConfig(kind="fusion-encoder"), pairs=32, seconds={"cpu": 60, "cuda": 10})
QUICK = Size(
    ModelConfig(kind="fusion-encoder", width=32, num_heads=2, num_layers=2, image_size=64, patch_size=32),
    3,
    {"cpu": 0, "cuda": 0},
)


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """One row a case, each after a check that both sides compute the same function."""
    size = QUICK if quick else FULL
    config = size.model
    for case in CASES[device.type]:
        torch.manual_seed(0)
        ours, peer = build_pair(config, {task: HEADS[task] for task in case.heads}, VOCABULARY.size)
        ours, peer = ours.to(device), peer.to(device)
        padded, cut = (to_device(captions(size, pad), device) for pad in (config.max_text_length, case.pad_multiple))
        for dtype in (torch.float32, case.ours):
            check_agreement(taught(ours.to(dtype), padded), peer, padded, TOLERANCE[dtype])
        yield compare(_contest(case, size, ours, peer.to(case.theirs), cut, padded), device, size.seconds[device.type])


def taught(model: Vilt, batch: Batch) -> Output:
    """What training gets of a teacher."""
    (lesson,) = teach([Teacher(model, weight=1.0, soft=frozenset(model.heads), head_map=None)], batch)
    return lesson.output


def _contest(case: Case, size: Size, ours: Vilt, peer: Peer, cut: Batch, padded: Batch) -> Contest:
    text_tokens = cut.text_ids.shape[1]
    return Contest(
        case=case.name,
        sizes={
            "pairs": size.pairs,
            "layers": size.model.num_layers,
            "width": size.model.width,
            "image": size.model.image_size,
            "heads": case.heads,
            "ours": {"dtype": str(case.ours), "text_tokens": text_tokens},
            "peer": {"dtype": str(case.theirs), "text_tokens": padded.text_ids.shape[1]},
        },
        ours=lambda: taught(ours, cut),
        peer=f"transformers {transformers.__version__}",
        theirs=lambda: peer(padded),
        floor=bare_products(case, size, text_tokens, cut.images.device),
    )


def bare_products(case: Case, size: Size, text_tokens: int, device: torch.device) -> Run:
    """The matrix products of one of our forwards on tensors that are there already, and nothing else."""
    config, pairs = size.model, size.pairs
    width, wide = config.width, config.width // config.num_heads
    patches = (config.image_size // config.patch_size) ** 2
    tokens = text_tokens + patches + 1
    read = text_tokens if any(HEADS[task].kind in READ_TOKENS for task in case.heads) else 1
    # [M, K] times [K, N], or [B, M, K] times [B, K, N]
    shapes: list[tuple[int, ...]] = [(pairs * patches, 3 * config.patch_size**2, width)]
    for finished in [tokens] * (config.num_layers - 1) + [read]:
        shapes += [
            (pairs * tokens, width, 3 * width),
            (pairs * config.num_heads, finished, wide, tokens),
            (pairs * config.num_heads, finished, tokens, wide),
            (pairs * finished, width, width),
            (pairs * finished, width, 4 * width),
            (pairs * finished, 4 * width, width),
        ]
    inputs, outputs, products = {}, {}, []
    for *many, m, k, n in shapes:
        a, out = (*many, m, k), (*many, m, n)
        if a not in inputs:
            inputs[a] = torch.randn(a, device=device, dtype=case.ours)
        if out not in outputs:
            outputs[out] = torch.empty(out, device=device, dtype=case.ours)
        # Weights of its own for every product, as in a model; inputs and outputs are shared.
        weights = torch.randn(*many, n, k, device=device, dtype=case.ours).mT
        products.append((inputs[a], weights, outputs[out]))
    return lambda: [torch.matmul(a, b, out=out) for a, b, out in products]


def captions(size: Size, pad_multiple: int) -> Batch:
    """Random images, each with a caption of its own whose words 1 and 2 are to be told; the same for every padding."""
    side = size.model.image_size
    batch = PairBatch(VOCABULARY, side, size.model.max_text_length, pad_multiple)
    for sample in captioned(size.pairs, side):
        batch.pair(sample, batch.image(sample), batch.text(sample.texts[0]), attention=1.0)
    zeros = torch.zeros(2 * size.pairs, dtype=torch.int64)
    batch.ask("itm", answers_to([(n,) for n in range(size.pairs)], 1, zeros[: size.pairs]))
    batch.ask("mlm", answers_to([(n, place) for n in range(size.pairs) for place in (1, 2)], 2, zeros))
    return batch.build()
