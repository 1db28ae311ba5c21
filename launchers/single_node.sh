#!/usr/bin/env bash
# Train a chain on one machine, one process a GPU, started by deepspeed.
#
#   launchers/single_node.sh RECIPE [compt train options] [key=value ...]
#   NPROC=4 launchers/single_node.sh emoji --run-dir runs/emoji parallel.zero=2
#
# Environment:
#   NPROC            processes to start (default: the GPUs that nvidia-smi lists, or 1)
#   MASTER_PORT      a free port of this machine (default 29500)
#   DS_ACCELERATOR   cpu trains without GPUs (default: cpu where there is no nvidia-smi)
#   OMP_NUM_THREADS  threads of each process (default: cores / NPROC)
#
# Exit status: 0 done, otherwise read RUN_DIR/status.json: exit_code 3 means stopped on request, start it again to go on.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,13p' "$0" >&2
  exit 2
fi

if command -v nvidia-smi >/dev/null 2>&1; then
  gpus=$(nvidia-smi --list-gpus | wc -l)
else
  gpus=1
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
processes="${NPROC:-$gpus}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(nproc) + processes - 1) / processes ))}"

exec deepspeed --num_gpus "$processes" --master_port "${MASTER_PORT:-29500}" \
  --module compt_megatron train "$@"
