#!/usr/bin/env bash
# What the image has beside its base, which brings torch, torchvision, triton and CUDA. `docker/install.sh CODE`: the
# folder CODE holds this repository. The one list of steps for Dockerfile and dist-fusion.def.
set -euo pipefail
code=$1
lock=$code/requirements.lock

export PYTHONNOUSERSITE=1 # Apptainer may build with the home of who builds: nothing in it counts as installed
export DEBIAN_FRONTEND=noninteractive
apt-get update
apt-get install -y --no-install-recommends ffmpeg g++ python3-dev python3-venv
rm -rf /var/lib/apt/lists/*

# V100s: the reason for this base. (torch.cuda.get_arch_list() is empty where there is no GPU, as while building.)
python3 -c 'import torch; built = torch._C._cuda_getArchFlags(); assert "sm_70" in built.split(), built'

# Beside the distribution's own packages, and before them. The lock is complete: nothing is resolved, torch stays.
python3 -m venv --system-site-packages /opt/dist-fusion
python=/opt/dist-fusion/bin/python
others=$(mktemp)
grep -vE '^(torch|torchvision|triton|deepspeed|nvidia-.+|cuda-.+)==' "$lock" >"$others"
"$python" -m pip install --no-cache-dir --no-deps --requirement "$others"
rm "$others"

# Of DeepSpeed's operations the one that is used: AdamW on the host, for the -offload files of ds_configs. An operation
# that was built for another accelerator than the one at work is compiled again, so the GPU must be named here.
DS_ACCELERATOR=cuda DS_BUILD_OPS=0 DS_BUILD_CPU_ADAM=1 \
    "$python" -m pip install --no-cache-dir --no-deps --no-build-isolation "$(grep '^deepspeed==' "$lock")"

"$python" -m pip install --no-cache-dir --no-deps --editable "$code"
(cd / && DS_ACCELERATOR=cuda "$python" -c '
from dist_fusion.engine.ops import HOST_ADAM, is_built
assert is_built(HOST_ADAM), "DeepSpeed was built without AdamW on the host"')
