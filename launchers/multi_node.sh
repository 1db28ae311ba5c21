#!/usr/bin/env bash
# Train a chain on several machines with the deepspeed launcher. All need the same installation, data paths and a run
# folder that all of them see (a shared file system): rank 0 writes it, the others read checkpoints from it.
#
# With ssh (pdsh), on the first machine only:
#   HOSTFILE=hostfile launchers/multi_node.sh RECIPE --run-dir /shared/runs/NAME [key=value ...]
#
# Without ssh, the same command on every machine (a scheduler or you start it there):
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=0 MASTER_ADDR=node0 launchers/multi_node.sh RECIPE --run-dir /shared/runs/NAME
#   HOSTFILE=hostfile NO_SSH=1 NODE_RANK=1 MASTER_ADDR=node0 launchers/multi_node.sh RECIPE --run-dir /shared/runs/NAME
#
# The hostfile has a line a machine, the first one is rank 0's:  node0 slots=8
#
# Environment:
#   HOSTFILE         the hostfile (default ./hostfile)
#   NO_SSH           1: start this machine's processes only
#   NODE_RANK        with NO_SSH: this machine's line in the hostfile, counted from 0
#   MASTER_ADDR      rank 0's address as the others reach it (needed with NO_SSH; default: deepspeed asks the first host)
#   MASTER_PORT      a free port of that machine (default 29500)
#   LAUNCHER         with ssh: pdsh (default), openmpi, mpich, ...: what deepspeed --launcher takes
#   DS_ACCELERATOR   cpu trains without GPUs (default: cpu where there is no nvidia-smi)
# With ssh these and your own variables reach the other machines through ./.deepspeed_env or ~/.deepspeed_env: a line
# a variable, NAME=VALUE (see launchers/deepspeed_env.example). Without ssh the shell's environment holds.
#
# Exit status: 0 done, otherwise read RUN_DIR/status.json: exit_code 3 means stopped on request, start it again to go on.
set -euo pipefail

if [[ $# -lt 1 ]]; then
  sed -n '2,28p' "$0" >&2
  exit 2
fi

hostfile="${HOSTFILE:-hostfile}"
if [[ ! -f "$hostfile" ]]; then
  echo "multi_node.sh: no hostfile '$hostfile'; write one ('node0 slots=8' a line) and name it in HOSTFILE" >&2
  exit 2
fi
if ! command -v nvidia-smi >/dev/null 2>&1; then
  export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

options=(--hostfile "$hostfile" --master_port "${MASTER_PORT:-29500}")
if [[ -n "${MASTER_ADDR:-}" ]]; then
  options+=(--master_addr "$MASTER_ADDR")
fi
if [[ "${NO_SSH:-0}" == 1 ]]; then
  : "${NODE_RANK:?set NODE_RANK to the line of this machine in the hostfile, counted from 0}"
  : "${MASTER_ADDR:?set MASTER_ADDR to the address of the first machine}"
  options+=(--no_ssh --node_rank "$NODE_RANK")
else
  options+=(--launcher "${LAUNCHER:-pdsh}" --force_multi)
fi

exec deepspeed "${options[@]}" --module compt_megatron train "$@"
