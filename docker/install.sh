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
#
# No operation of DeepSpeed's is built in. It compiles its AdamW on the host for the processor that it finds
# (-march=native, no variable says otherwise): built with AVX-512 here, it would be an illegal instruction on older hosts.
python3 -m venv --system-site-packages /opt/dist-fusion
python=/opt/dist-fusion/bin/python
others=$(mktemp)
grep -vE '^(torch|torchvision|triton|nvidia-.+|cuda-.+)==' "$lock" >"$others"
DS_BUILD_OPS=0 "$python" -m pip install --no-cache-dir --no-deps --requirement "$others"
rm "$others"

"$python" -m pip install --no-cache-dir --no-deps --editable "$code"
(cd / && PATH=/opt/dist-fusion/bin:$PATH DS_ACCELERATOR=cuda "$python" -c '
from dist_fusion.engine.ops import HOST_ADAM, is_built, why_not_compiled
assert not is_built(HOST_ADAM), "DeepSpeed has an AdamW that is compiled for this host alone"
assert not why_not_compiled(HOST_ADAM), why_not_compiled(HOST_ADAM)')
