"""Images that a text is certainly not about, from blocks of consecutive samples: so they do not depend on the ranks."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from dist_fusion.batch import Sample


def in_blocks(samples: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """The samples of each block of `size` positions of the stream."""
    for _, members in groupby(samples, key=lambda sample: sample.position // size):
        yield list(members)


def legal_images(block: Sequence[Sample], own: int) -> list[int]:
    """The samples of `block` whose image no text of sample `own` may truly describe.

    Never the same image, and never one with an equal caption.
    """
    captions, pictures = block[own].captions, set(block[own].image_ids)
    return [i for i, other in enumerate(block) if not pictures & set(other.image_ids) and not captions & other.captions]
