"""A run under trial: what is on its disk, and how much it had to do again."""

import hashlib
import json
from pathlib import Path

from dist_fusion.checkpoint.manifest import list_whole
from dist_fusion.monitor.events import read_events

STEPS = 24


def write_recipe(folder: Path, shards: Path) -> Path:
    """A small student without a teacher, saved often."""
    path = folder / "faults.yaml"
    path.write_text(
        f"""
name: run
runs: {folder}
steps: {STEPS}
global_batch: 8
tasks: {{mlm: , itm: {{block: 4}}, itc: {{dimensions: 8}}}}
model: {{width: 16, num_heads: 2, num_layers: 2, num_fusion_layers: 2, image_size: 32, patch_size: 16, dropout: 0.3}}
data: {{shards: [{shards}], dev: [{shards}], vocabulary: {shards}/vocab.txt, shuffle_buffer: 10, num_workers: 1}}
optimizer: {{learning_rate: 1e-3}}
log_every: 1
save_every: 5
evaluate_every: 8
"""
    )
    return path


def digest(run: Path) -> str:
    """Of the finished weights, and of every loss and score that was logged on the way."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = [
        [line["step"], key, value]
        for line in lines
        for key, value in line.items()
        if key.split("/")[0] in ("loss", "dev") or key == "optimizer/gradient_norm"
    ]
    weights = (run / "model.safetensors").read_bytes()
    return hashlib.sha256(weights + json.dumps(told).encode()).hexdigest()[:12]


def last_step(run: Path) -> int:
    """The last one that was logged; 0 before the first."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def resumed_from(run: Path) -> int:
    """Where the last life of a run began."""
    return [event for event in read_events(run) if event.kind == "started"][-1].details["resumed_from"] or 0


def found(run: Path) -> str:
    """What is whole on disk, and what lies beside it."""
    whole = [saved.step for saved in list_whole(run)]
    others = [path.name for path in sorted((run / "checkpoints").glob("step-*")) if int(path.name[5:]) not in whole]
    beside = f", {' '.join(others)} not whole" if others else ""
    return f"{' '.join(map(str, whole)) or 'none'} whole{beside}"
