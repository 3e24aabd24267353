"""What the tests on a GPU share."""

from pathlib import Path

import pytest

from dist_fusion.engine.ranks import start_ranks, stop_ranks


@pytest.fixture(scope="session")
def device():
    """This process as the only rank of a group, on its GPU; one for all tests, since DeepSpeed remembers its groups."""
    yield start_ranks()
    stop_ranks()


@pytest.fixture(scope="session")
def recipe(shards, tmp_path_factory) -> Path:
    """A small student on the shards that all tests share, whose losses do not depend on the ranks."""
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(
        f"""
name: small
steps: 4
global_batch: 8
log_every: 1
tasks: {{mlm: , itm: {{block: 4}}, itc: {{dimensions: 8}}}}
model: {{width: 64, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16, dropout: 0}}
data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10, num_workers: 1}}
optimizer: {{learning_rate: 1e-3}}
"""
    )
    return path
