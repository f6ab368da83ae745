#!/usr/bin/env bash
# Fine-tune Stable Diffusion 2.0-base on RANK_SIZE devices of one host, data parallel: each takes train_batch_size pictures of every
# batch. Variables and further arguments are those of run_train_dreambooth_sd_v2.sh, and:
#   RANK_SIZE        devices [8]
#   launcher         msrun, mpirun (OpenMPI), or rank_table (Ascend; RANK_TABLE_FILE names the table) [msrun]
#   mpirun_options, msrun_options    further words for the launcher
#   MASTER_PORT, log_dir             of msrun [8118, a folder msrun_logs in output_path]
#   devices          rank_table: the device numbers of this host's ranks, in their order ["0 1 2 ..."]
#   RANKS_BEFORE     rank_table on several hosts: how many ranks the hosts before this one have [0]
# Ctrl-C and SIGTERM let all of them end their step and save their state.
set -euo pipefail
cd "$(dirname "$0")/.."

export RANK_SIZE="${RANK_SIZE:-8}" use_parallel=True
# Seconds until msrun notices that a process was killed; on an Ascend eight compilations at once can hold a heartbeat longer.
export MS_NODE_TIMEOUT="${MS_NODE_TIMEOUT:-$([[ -e /dev/davinci_manager ]] && echo 120 || echo 20)}"
# A rank table in the environment (ModelArts) would put all processes of mpirun and msrun on device DEVICE_ID.
[[ ${launcher:-msrun} == rank_table ]] || unset RANK_TABLE_FILE
# OpenMPI (4: OMPI, 5: PRTE) would bind each of two processes to a single core.
export OMPI_MCA_hwloc_base_binding_policy="${OMPI_MCA_hwloc_base_binding_policy:-none}"
export PRTE_MCA_hwloc_default_binding_policy="${PRTE_MCA_hwloc_default_binding_policy:-none}"
train=scripts/run_train_dreambooth_sd_v2.sh

# What is started below is in sessions of its own, out of reach of the terminal's Ctrl-C. The processes that train get SIGTERM instead:
# msrun passes no signal on, it kills its processes or leaves them running; mpirun kills them a second later, before they have saved.
started=() status='' launched_by=$$
export launched_by

ranks() { # the processes that train, on this host
  local environ process
  [[ ${launcher:-msrun} != rank_table ]] || { printf '%s\n' ${started[@]+"${started[@]}"} && return; }
  for environ in /proc/[0-9]*/environ; do
    process=${environ//[^0-9]/}
    if grep -qz "^launched_by=$$\$" "$environ" && grep -qzE '^(MS_ROLE=MS_WORKER$|OMPI_COMM_WORLD_RANK=)' "$environ" &&
      [[ $(cat "/proc/$process/comm") != tail ]]; then # msrun's view of its log
      echo "$process"
    fi
  done 2>/dev/null
}

kill_all() { # without a chance to save
  local leader
  for leader in ${started[@]+"${started[@]}"}; do kill -KILL -- "-$leader" 2>/dev/null || true; done
}

stop() { # all, after their step, and leave with this status
  status=$1
  local processes
  mapfile -t processes < <(ranks)
  if ((${#processes[@]})); then kill "${processes[@]}" 2>/dev/null || true; else kill_all; fi
}

trap 'stop 129' HUP
trap 'stop 130' INT
trap 'stop 143' TERM

case "${launcher:-msrun}" in
  mpirun)
    as_root=$([[ $(id -u) == 0 ]] && echo --allow-run-as-root || true)
    # shellcheck disable=SC2086
    launch_words=$(printf '%s\n' mpirun $as_root -n "$RANK_SIZE" ${mpirun_options:-})
    export launch_words
    setsid bash "$train" "$@" &
    started+=($!)
    ;;
  msrun)
    logs="${log_dir:-${output_path:-output}/msrun_logs}"
    PATH="$(dirname "$(command -v "${PYTHON:-python}")"):$PATH" # msrun knows its interpreter by the name "python" only
    # shellcheck disable=SC2086
    launch_words=$(printf '%s\n' msrun --worker_num="$RANK_SIZE" --local_worker_num="$RANK_SIZE" --master_port="${MASTER_PORT:-8118}" \
      --log_dir="$logs" --join=True ${msrun_options:-})
    export launch_words
    PYTHON=python setsid bash "$train" "$@" &
    started+=($!)
    ;;
  rank_table)
    : "${RANK_TABLE_FILE:?launcher=rank_table needs the path of a rank table}"
    export RANK_TABLE_FILE
    here=$((RANK_SIZE - ${RANKS_BEFORE:-0}))
    ((here <= ${DEVICES_PER_HOST:-8})) || here=${DEVICES_PER_HOST:-8}
    if ((here < 1)); then
      echo "RANKS_BEFORE=$RANKS_BEFORE leaves none of the RANK_SIZE=$RANK_SIZE ranks to this host" >&2
      exit 2
    fi
    read -ra device_numbers <<<"${devices:-$(seq -s ' ' 0 $((here - 1)))}"
    if ((${#device_numbers[@]} != here)); then
      echo "devices=\"${devices:-}\": ${#device_numbers[@]} devices for the $here ranks of this host (RANK_SIZE=$RANK_SIZE)" >&2
      exit 2
    fi
    for ((place = 0; place < here; place++)); do
      DEVICE_ID=${device_numbers[place]} RANK_ID=$((${RANKS_BEFORE:-0} + place)) setsid bash "$train" "$@" &
      started+=($!)
    done
    ;;
  *)
    echo "launcher must be msrun, mpirun or rank_table, got $launcher" >&2
    exit 2
    ;;
esac

while [[ -n $(jobs -p) ]]; do
  code=0
  wait -n || code=$? # a signal ends `wait`, not what it waits for
  if ((code)) && [[ -z $status ]]; then
    status=$code
    kill_all # the first that fails ends the others, which may be waiting for it
  fi
done
exit "${status:-0}"
