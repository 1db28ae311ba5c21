#!/usr/bin/env bash
# Train a chain with torchrun, on one machine or on several that share the run folder. Run it on every machine.
#
#   launchers/torchrun.sh RECIPE [compt train options] [key=value ...]
#   NNODES=2 MASTER_ADDR=node0 launchers/torchrun.sh RECIPE --run-dir /shared/runs/NAME
#
# Environment:
#   NNODES           machines (default 1)
#   NPROC            processes on this machine (default: the GPUs that nvidia-smi lists, or 1)
#   MASTER_ADDR      the first machine's address (needed with NNODES > 1)
#   MASTER_PORT      a free port of that machine (default 29500)
#   JOB_ID           a name that the machines of one job share (default compt)
#   DS_ACCELERATOR   cpu trains without GPUs (default: cpu where there is no nvidia-smi)
#   OMP_NUM_THREADS  threads of each process (default 1)
#
# Exit status: 0 done, otherwise read RUN_DIR/status.json: exit_code 3 means stopped on request, start it again to go on.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,16p' "$0" >&2
  exit 2
fi

if command -v nvidia-smi >/dev/null 2>&1; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
else
  gpus=1
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

nodes="${NNODES:-1}"
port="${MASTER_PORT:-29500}"
if [[ "$nodes" == 1 ]]; then
  meeting=(--master-addr 127.0.0.1 --master-port "$port")
else
  : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port" --rdzv-id "${JOB_ID:-compt}")
fi

exec torchrun --nnodes "$nodes" --nproc-per-node "${NPROC:-$gpus}" "${meeting[@]}" \
  -m compt_megatron train "$@"
