#!/usr/bin/env bash
# Trains on NVIDIA GPUs of several nodes under SLURM, to the end of the run.
#
#   sbatch experiments/launch/slurm_gpu.sh
#
# To edit: nodes and GPUs below, WORKDIR, CONFIG, and how Python is found.
# JAX reads nodes, tasks and the number of each task from SLURM's variables: one
# process per GPU, the first of which is the coordinator.
#SBATCH --job-name=deltanet
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM comes to all tasks this many seconds before the time is up: two steps
# and a checkpoint have to fit.
#SBATCH --signal=TERM@300
set -uo pipefail

# On a file system that all nodes see, as is the directory this is started in.
WORKDIR=${WORKDIR:-runs/slurm}
CONFIG=${CONFIG:-delta_net_1b}
MOST_RESTARTS=${MOST_RESTARTS:-50}

# One task that ends badly ends all: none waits for a peer that is gone.
srun --kill-on-bad-exit=1 \
  python -u -m experiments.train_lm \
  --config="${CONFIG}" \
  --workdir="${WORKDIR}" \
  --peer_timeout_seconds=300 \
  --watchdog_seconds=600
status=$?

# report.json appears when the run is finished. Exit 1 is an error that would
# come again (a wrong flag, damaged data); what else ends a run (0: saved after
# SIGTERM; 75: lost a peer or hung; 137: killed) is mended by the same command.
if [[ -e "${WORKDIR}/report.json" || "${status}" -eq 1 ]]; then
  exit "${status}"
fi
if (( ${SLURM_RESTART_COUNT:-0} >= MOST_RESTARTS )); then
  echo "not started again after ${MOST_RESTARTS} restarts" >&2
  exit "${status}"
fi
scontrol requeue "${SLURM_JOB_ID}"
