#!/usr/bin/env bash
# Fine-tune on a SLURM cluster, one task a GPU:
#
#   sbatch slurm/finetune.sh [RECIPE] [key=value …]              a shipped recipe's name, or a path (vqa)
#   sbatch --nodes=4 --partition=gpu slurm/finetune.sh …         sbatch's options win over the lines below
#
# Before its time is up, or when it is preempted, the job saves on all ranks and goes back into the queue under its own
# number; it goes on where it stopped. `touch runs/<name>/STOP` lets it save and end. Where jobs may not be requeued, let
# a chain of jobs go on from one another; those that come after the end do nothing:
#
#   sbatch --no-requeue --array=1-30%1 slurm/finetune.sh …

# What your cluster may ask for. Take the second # away.
##SBATCH --partition=gpu
##SBATCH --account=my-account
##SBATCH --constraint=v100-32g

#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=5
#SBATCH --mem=0
#SBATCH --time=20:00:00

# To the tasks, so many seconds before the end (up to 60 sooner): more than twice a step and a save, less than --time.
# Never "B:": that would reach this shell alone.
#SBATCH --signal=USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# Where sbatch takes no environment over (--export=NONE), srun would leave out what this shell sets, too.
export SLURM_EXPORT_ENV=ALL

# Where the nodes' names lead to a network that they do not share, name the right one (see `ip -brief address`).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

recipe=${1:-vqa}
shift $(($# > 0))
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)}

# Nothing is started on eight GPUs that one process can refuse.
((${SLURM_RESTART_COUNT:-0})) || "$python" -m launcher check "$recipe" "$@" --ranks "$SLURM_NTASKS"

exec srun --kill-on-bad-exit=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    "$python" -m launcher worker "$recipe" "$@"
