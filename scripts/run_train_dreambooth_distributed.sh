#!/usr/bin/env bash
# Fine-tune Stable Diffusion 2.0-base on RANK_SIZE devices of one host, data parallel: each takes train_batch_size pictures of every
# batch. Variables and further arguments are those of run_train_dreambooth_sd_v2.sh, and:
#   RANK_SIZE        devices [8]
#   launcher         msrun, mpirun (OpenMPI), or rank_table (Ascend; RANK_TABLE_FILE names the table) [msrun]
#   RANKS_BEFORE     rank_table on several hosts: how many ranks the hosts before this one have [0]
set -euo pipefail
cd "$(dirname "$0")/.."

export RANK_SIZE="${RANK_SIZE:-8}" use_parallel=True
export MS_NODE_TIMEOUT="${MS_NODE_TIMEOUT:-20}" # seconds until msrun notices that a process was killed
# OpenMPI gives its processes one second after SIGTERM; saving the state of a run takes longer.
export OMPI_MCA_odls_base_sigkill_timeout="${OMPI_MCA_odls_base_sigkill_timeout:-300}"
export PRTE_MCA_odls_base_sigkill_timeout="${PRTE_MCA_odls_base_sigkill_timeout:-300}"
train=scripts/run_train_dreambooth_sd_v2.sh

case "${launcher:-msrun}" in
  mpirun)
    as_root=$([[ $(id -u) == 0 ]] && echo --allow-run-as-root || true)
    launch="mpirun $as_root -n $RANK_SIZE ${mpirun_options:-}" exec bash "$train" "$@"
    ;;
  msrun)
    logs="${log_dir:-${output_path:-output}/msrun_logs}"
    PATH="$(dirname "$(command -v "${PYTHON:-python}")"):$PATH" # msrun knows its interpreter by the name "python" only
    launch="msrun --worker_num=$RANK_SIZE --local_worker_num=$RANK_SIZE --master_port=${MASTER_PORT:-8118} --log_dir=$logs --join=True \
      ${msrun_options:-}" PYTHON=python exec bash "$train" "$@"
    ;;
  rank_table)
    : "${RANK_TABLE_FILE:?launcher=rank_table needs the path of a rank table}"
    export RANK_TABLE_FILE
    trap 'kill $(jobs -p) 2>/dev/null' EXIT
    for ((device = 0; device < RANK_SIZE - ${RANKS_BEFORE:-0} && device < ${DEVICES_PER_HOST:-8}; device++)); do
      DEVICE_ID=$device RANK_ID=$((${RANKS_BEFORE:-0} + device)) bash "$train" "$@" &
    done
    while [[ -n $(jobs -rp) ]]; do
      wait -n || exit # the first that fails ends the others
    done
    ;;
  *)
    echo "launcher=$launcher: msrun, mpirun or rank_table is wanted" >&2
    exit 2
    ;;
esac
