#!/usr/bin/env bash
# Runs a job on this machine with its GPUs until it is finished, and starts it again where it ended early.
#
#   launch/gpu_host.sh python -m ldm_jax.train --config configs/txt2img.py:sd1 --workdir runs/sd1 \
#     --config.train.init_from=models/sd1 --config.data.path=/data/pictures --config.train.accumulation=16
#   nohup launch/gpu_host.sh ... > sd1.log 2>&1 &        # goes on after logging out
#
# One process drives all GPUs that it sees (CUDA_VISIBLE_DEVICES chooses). PROCESSES=8 starts one for each of the first eight of them instead,
# which join at PORT (a free one): more processes read and decode data. SIGTERM or Ctrl-C reach the job, which writes a checkpoint and ends
# with 75; it is not started again then. Exit codes and restarts, DRY_RUN=1: launch/common.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || usage
processes=${PROCESSES:-1}
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "PROCESSES=$processes: give 1 (for all GPUs) or more"
PATH=$(dirname "$(dirname "$script")")/.venv/bin:$PATH

IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((processes - 1)))}"
if [ "${#devices[@]}" -lt "$processes" ]; then fail "PROCESSES=$processes, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has ${#devices[@]}"; fi

listening() { (: <"/dev/tcp/localhost/$1") 2>/dev/null; } # whether a program does at a port
attempt() {
    local i port=${PORT:-$((20000 + RANDOM % 10000))}
    while [ "$processes" -gt 1 ] && listening "$port"; do # another job, which the processes of this one would join
        if [ -n "${PORT:-}" ]; then fail "PORT=$PORT: another program listens there"; fi
        port=$((20000 + RANDOM % 10000))
    done
    if [ "$processes" -eq 1 ]; then
        spawn "$@"
    else
        for ((i = 0; i < processes; i++)); do
            spawn env "CUDA_VISIBLE_DEVICES=${devices[i]}" "$@" \
                --coordinator "localhost:$port" --num-processes "$processes" --process-id "$i"
        done
    fi
    await
}

supervise
before=$(progress "$@")
while :; do
    code=0
    attempt "$@" || code=$?
    if [ -n "$signalled" ]; then exit "$code"; fi
    again "$code" "$(progress "$@")" || exit "$code"
done
