"""The deepspeed launcher with a hostfile: what it would start on other nodes, and two nodes of it on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_fusion.engine.ranks import free_port

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))


@pytest.fixture
def hosts(tmp_path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("node1 slots=1\nnode2 slots=1\n")
    return path


def test_a_hostfile_starts_the_same_command_on_every_host(hosts, tmp_path):
    """By pdsh, for which a script stands in that tells how it was called."""
    pdsh = tmp_path / "bin" / "pdsh"
    pdsh.parent.mkdir()
    pdsh.write_text('#!/bin/sh\necho "called: $@"\n')
    pdsh.chmod(0o755)
    environment = {**os.environ, "PATH": f"{pdsh.parent}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = [DEEPSPEED, "--hostfile", str(hosts), "--no_ssh_check"]
    command += ["--master_addr", "node1", "--master_port", "29611"]
    done = subprocess.run(
        [*command, "--module", "dist_fusion.train", "pretrain", "tasks.itm.block=8"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    called = next((line for line in done.stdout.splitlines() if line.startswith("called: ")), "")
    assert called, done.stderr
    assert "-w node1,node2" in called
    assert "--node_rank=%n" in called and "--master_addr=node1" in called and "--master_port=29611" in called
    assert " --module " in called and called.endswith(" dist_fusion.train pretrain tasks.itm.block=8")


@pytest.mark.launch
def test_two_nodes_without_ssh_train_together(hosts, shards, tmp_path):
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"name: small\nruns: {tmp_path}/runs\nsteps: 2\nglobal_batch: 8\ntasks: {{itm: {{block: 4}}}}\n"
        "model: {width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16}\n"
        f"data: {{shards: [{shards}], vocabulary: {shards}/vocab.txt}}\n"
    )
    command = [DEEPSPEED, "--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port())]
    nodes = [
        subprocess.Popen([*command, "--node_rank", str(node), "--module", "dist_fusion.train", str(recipe)])
        for node in range(2)
    ]
    assert [node.wait(240) for node in nodes] == [0, 0]
    assert (tmp_path / "runs" / "small" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "small" / "logs" / "rank-1.pid").is_file()
