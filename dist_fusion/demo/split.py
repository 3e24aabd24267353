"""The demo's test split, as every part of its answer reads it."""

from pathlib import Path

from dist_fusion.data.stream import DataConfig, Plan, Stream
from dist_fusion.data.text import Tokenizer
from dist_fusion.models.weights import ModelCard
from dist_fusion.tasks.vqa import Vqa

TASK = "vqa"
IMAGES_A_BATCH = 50


def read_test(folder: Path, card: ModelCard) -> tuple[dict[str, Vqa], Stream]:
    """The task and one pass over all test images with all their questions."""
    shards = folder / "shards"
    data = DataConfig(shards=(str(shards / "test"),), vocabulary=str(shards / "vocab.txt"), pad_multiple=1)
    tasks = {TASK: Vqa(answers=str(shards / "answers.json"))}
    tokenizer = Tokenizer(data.vocabulary, card.config.max_text_length)
    plan = Plan(IMAGES_A_BATCH, rank=0, world_size=1, seed=0)
    return tasks, Stream(data, tasks, tokenizer, card.config.image_size, plan, endless=False)
