#!/bin/bash
# A run on several nodes under Slurm: one torchrun a node, which starts one process a GPU.
#
#     sbatch examples/slurm.sh emoji --data.root /data --run.dir /shared/runs/emoji
#
# Submitted again, it goes on from the last checkpoint. The run folder must be on a file system that all nodes share.
#SBATCH --job-name=triscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1 # a process a GPU; reading and decoding have --data.workers

# Slurm sends TERM to srun's processes before the time is up: each finishes its step, and the checkpoint is written.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$first_node:29500" \
    --rdzv-id "$SLURM_JOB_ID" \
    -m triscale train "$@" \
    --parallel.shard full \
    --parallel.replicas "$SLURM_JOB_NUM_NODES"
