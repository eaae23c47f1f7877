#!/bin/bash
# Trains one model on several nodes; a job that is requeued, or submitted again, goes on after its last whole epoch.
#
#   srcgcnn-fast prepare train.parquet graphs --target formation_energy_per_atom
#   sbatch examples/slurm.sh graphs run --target formation_energy_per_atom --epochs 60
#
# One process for every GPU of a node, or two on a node without. All nodes must see both directories.
#SBATCH --job-name=srcgcnn
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
graphs=$1 run=$2
shift 2

processes=${SLURM_GPUS_ON_NODE:-2}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=
[[ -e $run/last.ckpt ]] && resume=--resume
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > processes ? SLURM_CPUS_PER_TASK / processes : 1))

srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 20000))" \
    --no-python srcgcnn-fast train "$graphs" --out "$run" $resume "$@"
