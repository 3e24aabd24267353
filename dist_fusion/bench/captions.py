"""Images with captions as long as people write them, made up: what a bench of pre-training reads."""

from random import Random

import torch

from dist_fusion.batch import Sample, Text
from dist_fusion.types import Vocabulary

VOCABULARY = Vocabulary(30522, 0, 101, 102, 103)
CAPTION = (10, 15)  # tokens, [CLS] and [SEP] included


def captioned(count: int, image_size: int) -> list[Sample]:
    """The same random images whenever asked, [3, h, w] each, with a caption of its own, every token a word."""
    draw, pixels = Random(0), torch.Generator().manual_seed(0)
    samples = []
    for n in range(count):
        words = tuple(draw.randrange(1000, 30000) for _ in range(draw.randint(*CAPTION) - 2))
        text = Text((VOCABULARY.cls, *words, VOCABULARY.sep), (None, *range(len(words)), None))
        image = torch.randn(3, image_size, image_size, generator=pixels)
        samples.append(Sample((image,), (n,), (text,), frozenset({text.content}), (), (), n, str(n)))
    return samples
