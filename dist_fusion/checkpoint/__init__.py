"""The folder of a run, and its sharded checkpoints.

    runs/<name>/config.yaml  ds_config.json  versions.json  metrics.jsonl  tb/  logs/  model.json  model.safetensors
    runs/<name>/checkpoints/latest
    runs/<name>/checkpoints/step-00000400/   DeepSpeed's shards, rank-<r>.pt, and manifest.json, written last

A checkpoint is what its manifest says is whole; a folder without one is no candidate. The teacher is never in it.
Resuming is for runs of one's own: DeepSpeed unpickles its shards. Weights travel as model.safetensors.
"""
