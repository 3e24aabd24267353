"""Where one word looks: its attention over the image, teacher beside students."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dist_fusion.demo.split import read_test
from dist_fusion.models.weights import restore_model
from dist_fusion.types import Batch, Tap

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = (
    ("teacher-vqa", "t2i", "teacher"),
    ("student-vqa", "tower.t2i", "student, towers"),
    ("student-vqa", "bridge.t2i", "student, bridge"),
    ("undistilled-vqa", "bridge.t2i", "not distilled, bridge"),
)
EXAMPLES = 4


@torch.no_grad()
def draw_attention(folder: Path, seed: int) -> Path:
    """Write `attention.png` (and the same picture for TensorBoard): the word "shape" over some test images."""
    runs = folder / f"seed-{seed}"
    restored = {
        name: restore_model(runs / name, "the demo's run") for name in dict.fromkeys(name for name, _, _ in PANELS)
    }
    models = {name: model for name, (_, model) in restored.items()}
    card, _ = restored["teacher-vqa"]
    _, stream = read_test(folder, card)
    batch, words_of = next(iter(stream)).batch, card.vocabulary
    chosen = _examples(batch, words_of)
    figure, axes = pyplot.subplots(len(chosen), 1 + len(PANELS), figsize=(2.2 * (1 + len(PANELS)), 2.4 * len(chosen)))
    outputs = {name: model(batch).taps for name, model in models.items()}
    size = card.config.image_size
    for row, (pair, place) in zip(axes, chosen, strict=True):
        image_row, text_row = batch.pairs[pair].tolist()
        pixels = (batch.images[image_row].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
        words = [
            words_of[i] for i, real in zip(batch.text_ids[text_row], batch.text_mask[text_row], strict=True) if real
        ]
        row[0].imshow(pixels)
        row[0].set_title(" ".join(words[1:-1]).replace(" ##", "").replace(" ?", "?"), fontsize=7)
        for panel, (name, site, title) in zip(row[1:], PANELS, strict=True):
            panel.imshow(pixels)
            heat = _over_patches(outputs[name][site], pair, place)
            panel.imshow(heat, cmap="inferno", alpha=0.6, extent=(0, size, size, 0), interpolation="bilinear", vmin=0)
            panel.set_title(title, fontsize=8)
        for panel in row:
            panel.axis("off")
    figure.suptitle('Attention of the word "shape" over the image (mean of the heads)', fontsize=10)
    figure.tight_layout()
    path = folder / "attention.png"
    figure.savefig(path, dpi=110)
    figure.canvas.draw()
    with SummaryWriter(str(folder / "tb")) as board:
        board.add_image("attention/shape", np.asarray(figure.canvas.buffer_rgba())[..., :3], 0, dataformats="HWC")
    pyplot.close(figure)
    return path


def _examples(batch: Batch, words_of: Sequence[str]) -> list[tuple[int, int]]:
    """(pair, position of "shape") of a question each to different images."""
    word = words_of.index("shape")
    found: dict[int, tuple[int, int]] = {}
    for pair, (image, text) in enumerate(batch.pairs.tolist()):
        places = (batch.text_ids[text] == word).nonzero().flatten().tolist()
        if places and image not in found and words_of.index("what") in batch.text_ids[text]:
            found[image] = (pair, places[0])
    return list(found.values())[:EXAMPLES]


def _over_patches(tap: Tap, pair: int, place: int) -> np.ndarray:
    """One query's attention over the patches as a square, class token left out, mean of the heads."""
    query, key = tap.query[pair, :, place], tap.key[pair]  # [H, K], [H, N, K]
    scores: Tensor = (key @ query[:, :, None]).squeeze(-1) / query.shape[-1] ** 0.5
    patches = scores.softmax(-1)[:, 1:].mean(0)
    side = int(len(patches) ** 0.5)
    square: np.ndarray = patches.view(side, side).numpy()
    return square
