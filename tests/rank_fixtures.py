"""Fixtures of real ranks, started at their first use and shared by the whole session."""

from pathlib import Path

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks") / "two.log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    ranks = Ranks(1, tmp_path_factory.mktemp("ranks") / "one.log")
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory) -> Path:
    """A recipe whose data is never read: checks bring their own batches."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        "name: tiny\nsteps: 10\nglobal_batch: 32\ntasks: {mlm: , itm: {block: 4}, itc: {dimensions: 8}}\n"
        "optimizer: {learning_rate: 1e-3, warmup: 0.1}\n"
    )
    return path
