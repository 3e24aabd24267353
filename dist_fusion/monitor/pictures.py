"""Where words look: attention over a few pictures that stay the same, teacher beside student, all through a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_fusion.agreement import attention
from dist_fusion.data.stream import DataConfig, Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.distributed import rank
from dist_fusion.models.teachers import Teacher, teach
from dist_fusion.monitor.board import Board
from dist_fusion.tasks import Task
from dist_fusion.types import Batch, Tap, to_device

FEW = 3
"""Pictures that are shown."""
INCH = 1.9
"""The side of a picture."""


class Query(NamedTuple):
    """A token whose attention is shown."""

    pair: int
    place: int  # in its text
    title: str


class Heat(NamedTuple):
    """Where the queries look, by whom: [Q, side, side], shares of the patches, the class token left out."""

    title: str
    shares: Tensor


def fixed_batch(
    config: DataConfig, tasks: Mapping[str, Task], tokenizer: Tokenizer, image_size: int, seed: int
) -> Batch:
    """The same few samples for every rank and life: those that come first in the order of `seed`.

    Held-out ones, or of the training shards where none are held out. Collective. Raises UserError like `Stream`.
    """
    plain = replace(config, augment="none")
    held_out = replace(plain, shards=config.dev, sources={}) if config.dev else plain
    stream = Stream(held_out, tasks, tokenizer, image_size, Plan(FEW, rank=0, world_size=1, seed=seed))
    return next(iter(stream)).batch


def chosen_queries(batch: Batch, entries: Sequence[str]) -> list[Query]:
    """Of each picture's first pair, one whose attention is distilled if there is one: the class token and one word.

    The word is the longest, and of several the first, since long words mean something. `entries` name the tokens.
    """
    weight = batch.weights["attention"]
    order = sorted(range(len(batch.pairs)), key=lambda pair: (-float(weight[pair] > 0), pair))
    shown: dict[int, int] = {}
    for pair in order:
        shown.setdefault(int(batch.pairs[pair, 0]), pair)
    found = []
    for _, pair in sorted(shown.items())[:FEW]:
        text = int(batch.pairs[pair, 1])
        words = [entries[i] for i in batch.text_ids[text, batch.text_mask[text]].tolist()]
        place = max(range(len(words)), key=lambda i: (words[i][:1] != "[", len(words[i].removeprefix("##")), -i))
        found += [Query(pair, 0, words[0]), Query(pair, place, words[place].removeprefix("##"))]
    return found


@torch.no_grad()
def heats(
    model: nn.Module, teachers: Sequence[Teacher], batch: Batch, queries: Sequence[Query], device: torch.device
) -> list[Heat]:
    """Where `queries` look at each site whose keys are patches, the teachers' first. Collective: every rank runs it.

    It draws no random numbers, and leaves the model in the mode in which it was.
    """
    training = model.training
    model.eval()
    batch = to_device(batch, device)
    lessons = teach(teachers, batch)
    taps = {"teacher" if len(lessons) == 1 else f"teacher {n}": one.output.taps["t2i"] for n, one in enumerate(lessons)}
    taps |= {site: tap for site, tap in model(batch).taps.items() if site.endswith("t2i")}
    model.train(training)
    return [Heat(title, _over_patches(tap, queries)) for title, tap in taps.items()]


def _over_patches(tap: Tap, queries: Sequence[Query]) -> Tensor:
    """[Q, side, side]: the mean of the heads, on the host."""
    rows = attention(Tap(*(part[[query.pair for query in queries]] for part in tap))).mean(1)
    own = rows[range(len(queries)), [query.place for query in queries], 1:]
    side = round(own.shape[-1] ** 0.5)
    return own.view(-1, side, side).cpu()


def draw(batch: Batch, queries: Sequence[Query], seen: Sequence[Heat], entries: Sequence[str]) -> NDArray[np.uint8]:
    """A picture [h, w, 3]: a row a query, its image and text at the left, then whose attention it is above each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second, and rank 0 alone draws
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCH * (1 + len(seen)), INCH * 1.25 * len(queries)), dpi=100, layout="tight")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(queries), 1 + len(seen), squeeze=False)
    size = batch.images.shape[-1]
    for number, (query, row) in enumerate(zip(queries, axes, strict=True)):
        image, text = batch.pairs[query.pair].tolist()
        pixels = (batch.images[image].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
        row[0].set_title(_sentence(batch, text, entries), fontsize=7)
        for panel in row:
            panel.imshow(pixels, extent=(0, size, size, 0))
            panel.axis("off")
        for heat, panel in zip(seen, row[1:], strict=True):
            shares = heat.shares[number].numpy()
            panel.imshow(shares, cmap="inferno", alpha=0.6, extent=(0, size, size, 0), interpolation="bilinear", vmin=0)
            panel.set_title(f"{heat.title}: “{query.title}”", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _sentence(batch: Batch, text: int, entries: Sequence[str]) -> str:
    """A text in lines of a few words, for people."""
    words = [entries[i] for i in batch.text_ids[text, batch.text_mask[text]].tolist()]
    whole = " ".join(words[1:-1]).replace(" ##", "")
    lines = [""]
    for word in whole.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < 26 else [*lines, word]
    return "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")


class Overlays:
    """Draws the same queries again and again."""

    def __init__(self, batch: Batch, teachers: Sequence[Teacher], entries: Sequence[str], device: torch.device):
        self._batch, self._teachers, self._entries, self._device = batch, teachers, entries, device
        self._queries = chosen_queries(batch, entries)

    def show(self, model: nn.Module, board: Board, step: int) -> None:
        """Put the picture of now on the board, as `attention`. Collective."""
        seen = heats(model, self._teachers, self._batch, self._queries, self._device)
        if rank() == 0:
            board.picture("attention", draw(self._batch, self._queries, seen, self._entries), step)
