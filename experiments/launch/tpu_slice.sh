#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU slice, to the end of the run.
#
#   TPU=my-slice ZONE=us-east5-a bash experiments/launch/tpu_slice.sh
#
# Before: the slice exists, DIRECTORY on every host holds this repository with
# '.[tpu]' installed in .venv, and WORKDIR is a directory that all hosts mount
# (Filestore or another NFS; an object store has no renames). JAX reads hosts
# and numbers from the TPU's metadata: no flags say who a process is.
set -uo pipefail

TPU=${TPU:?name of the TPU slice}
ZONE=${ZONE:?its zone}
DIRECTORY=${DIRECTORY:-deltanet}
WORKDIR=${WORKDIR:-/mnt/runs/deltanet}
CONFIG=${CONFIG:-delta_net_1b}
MOST_STARTS=${MOST_STARTS:-50}

on_hosts() {  # on_hosts WORKERS COMMAND
  gcloud compute tpus tpu-vm ssh "${TPU}" --zone="${ZONE}" \
    --worker="$1" --command="$2"
}

# What a lost connection leaves running would hold the chips and the directory.
readonly STOP="fuser -k -TERM /dev/accel* /dev/vfio/* 2>/dev/null || true"
readonly TRAIN="cd '${DIRECTORY}' && exec .venv/bin/python -u \
  -m experiments.train_lm \
  --config='${CONFIG}' \
  --workdir='${WORKDIR}' \
  --peer_timeout_seconds=300 \
  --watchdog_seconds=600"

for (( start = 1; start <= MOST_STARTS; start++ )); do
  on_hosts all "${TRAIN}"
  status=$?
  # report.json appears when the run is finished. Exit 1 is an error that would
  # come again; 0 without a report is a run saved after SIGTERM, 75 one that
  # lost a peer or hung, 255 a lost connection: the same command resumes.
  if on_hosts 0 "test -e '${WORKDIR}/report.json'"; then
    exit 0
  fi
  if [[ "${status}" -eq 1 ]]; then
    exit 1
  fi
  on_hosts all "${STOP}"
  sleep 30
done
echo "not finished after ${MOST_STARTS} starts" >&2
exit 75
