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


@pytest.fixture(scope="session")
def small_recipe(shards, tmp_path_factory) -> Path:
    """A small student without a teacher, on the shards that all tests share."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(
        f"""
name: small
runs: {path.parent}/runs
steps: 4
global_batch: 8
tasks: {{mlm: , itm: {{block: 4}}, itc: {{dimensions: 8}}}}
model: {{width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16}}
data: {{shards: [{shards}], dev: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10}}
optimizer: {{learning_rate: 1e-3}}
"""
    )
    return path
