#!/usr/bin/env bash
# Score a finished run on shards, on one GPU:
#
#   sbatch slurm/evaluate.sh RUN SHARDS [SHARDS …]               writes RUN/evaluate.json; the scores are in the log
#   sbatch --partition=gpu slurm/evaluate.sh …                   sbatch's options win over the lines below

# What your cluster may ask for. Take the second # away.
##SBATCH --partition=gpu
##SBATCH --account=my-account

#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=5
#SBATCH --mem=32G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Where sbatch takes no environment over (--export=NONE), srun would leave out what this shell sets, too.
export SLURM_EXPORT_ENV=ALL

run=${1:?write: sbatch slurm/evaluate.sh RUN SHARDS [SHARDS …]}
shift
(($#)) || { echo "no shards are named: sbatch slurm/evaluate.sh $run SHARDS [SHARDS …]" >&2; exit 2; }
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}

exec srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$python" -m dist_fusion evaluate "$run" --shards "$@"
