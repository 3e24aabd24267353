"""Where words look: attention over a few pictures that stay the same, teacher beside student, all through a run."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
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


class Scene(NamedTuple):
    """A picture with a text, and the tokens whose attention is shown."""

    batch: Batch  # of one sample, so that no text is beside a picture of another
    pair: int
    places: tuple[int, ...]  # of tokens in the text
    words: tuple[str, ...]  # those tokens


class Heat(NamedTuple):
    """Where all scenes' tokens look, by whom: [Q, side, side], shares of the patches, without the class token."""

    title: str
    shares: Tensor


def fixed_scenes(
    config: DataConfig, tasks: Mapping[str, Task], tokenizer: Tokenizer, image_size: int, seed: int
) -> list[Scene]:
    """The same few samples for every rank and life: those that come first in the order of `seed`.

    Held-out ones, or of the training shards where none are held out. Collective. Raises UserError like `Stream`.
    """
    plain = replace(config, augment="none")
    held_out = replace(plain, shards=config.dev, sources={}) if config.dev else plain
    stream = Stream(held_out, tasks, tokenizer, image_size, Plan(1, rank=0, world_size=1, seed=seed))
    return [scene(loaded.batch, tokenizer.entries) for loaded in islice(stream, FEW) if len(loaded.batch.pairs)]


def scene(batch: Batch, entries: Sequence[str]) -> Scene:
    """Of a sample's first pair, one whose attention is distilled if there is one, the class token and one word.

    The word is the longest, and of several the first, since long words mean something. `entries` name the tokens.
    """
    pair = int((batch.weights["attention"] > 0).float().argmax())
    words = _words(batch, pair, entries)
    place = max(range(len(words)), key=lambda i: (words[i][:1] != "[", len(words[i].removeprefix("##")), -i))
    return Scene(batch, pair, (0, place), (words[0], words[place].removeprefix("##")))


def _words(batch: Batch, pair: int, entries: Sequence[str]) -> list[str]:
    text = int(batch.pairs[pair, 1])
    return [entries[i] for i in batch.text_ids[text, batch.text_mask[text]].tolist()]


@torch.no_grad()
def heats(model: nn.Module, teachers: Sequence[Teacher], scenes: Sequence[Scene], device: torch.device) -> list[Heat]:
    """Where the tokens look at each site whose keys are patches, the teachers' first. Collective: every rank runs it.

    It draws no random numbers, and leaves the model in the mode in which it was.
    """
    training = model.training
    model.eval()
    found: dict[str, list[Tensor]] = {}
    for one in scenes:
        batch = to_device(one.batch, device)
        lessons = teach(teachers, batch)
        names = ["teacher"] if len(lessons) == 1 else [f"teacher {number}" for number in range(len(lessons))]
        taps = {name: lesson.output.taps["t2i"] for name, lesson in zip(names, lessons, strict=True)}
        taps |= {site: tap for site, tap in model(batch).taps.items() if site.endswith("t2i")}
        for title, tap in taps.items():
            found.setdefault(title, []).append(_over_patches(tap, one))
    model.train(training)
    return [Heat(title, torch.cat(shares)) for title, shares in found.items()]


def _over_patches(tap: Tap, one: Scene) -> Tensor:
    """[tokens, side, side]: the mean of the heads, on the host."""
    rows = attention(Tap(*(part[one.pair, None] for part in tap)))[0].mean(0)[[*one.places], 1:]
    side = round(rows.shape[-1] ** 0.5)
    return rows.view(-1, side, side).cpu()


def draw(scenes: Sequence[Scene], seen: Sequence[Heat], entries: Sequence[str]) -> NDArray[np.uint8]:
    """A picture [h, w, 3]: a row a token, its image and text at the left, then whose attention it is above each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: it takes half a second, and rank 0 alone draws
    from matplotlib.figure import Figure

    tokens = [(one, word) for one in scenes for word in one.words]
    figure = Figure(figsize=(INCH * (1 + len(seen)), INCH * 1.2 * len(tokens)), dpi=100)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(tokens), 1 + len(seen), squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.25 / len(tokens), wspace=0.05, hspace=0.25)
    for number, ((one, word), row) in enumerate(zip(tokens, axes, strict=True)):
        pixels = (one.batch.images[one.batch.pairs[one.pair, 0]].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
        size = pixels.shape[0]
        row[0].set_title(_lines(_words(one.batch, one.pair, entries)), fontsize=7)
        for panel in row:
            panel.imshow(pixels, extent=(0, size, size, 0))
            panel.axis("off")
        for heat, panel in zip(seen, row[1:], strict=True):
            shares = heat.shares[number].numpy()
            panel.imshow(shares, cmap="inferno", alpha=0.6, extent=(0, size, size, 0), interpolation="bilinear", vmin=0)
            panel.set_title(f"{heat.title}: “{word}”", fontsize=8)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _lines(words: Sequence[str]) -> str:
    """A text, without the tokens at its ends, in short lines for people."""
    lines = textwrap.wrap(" ".join(words[1:-1]).replace(" ##", ""), 28) or [""]
    return "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")


class Overlays:
    """Draws the same scenes again and again."""

    def __init__(
        self, scenes: Sequence[Scene], teachers: Sequence[Teacher], entries: Sequence[str], device: torch.device
    ):
        self._scenes, self._teachers, self._entries, self._device = scenes, teachers, entries, device

    def show(self, model: nn.Module, board: Board, step: int) -> None:
        """Put the picture of now on the board, as `attention`. Collective."""
        seen = heats(model, self._teachers, self._scenes, self._device)
        if rank() == 0 and seen:
            board.picture("attention", draw(self._scenes, seen, self._entries), step)
