#!/usr/bin/env bash
# What launch/tpu_vm.sh runs on each worker of a slice, in its copy of the repository. A job lives on when the connection drops, and is started
# once however often it is asked for.
#
#   launch/worker.sh install             makes .venv with jax for TPUs
#   launch/worker.sh start ID COMMAND... stops what is left of other jobs and starts COMMAND in the background, but where ID was started before
#   launch/worker.sh status              "STATE ID" of the last job: running, its exit code, or stopped:CODE by `stop`; "none" without one
#   launch/worker.sh command             the command of the last job
#   launch/worker.sh log ID FROM         the log of a job from its byte FROM on
#   launch/worker.sh follow LINES        the last lines of the last job's log, and those to come
#   launch/worker.sh fault               the end of the last job's log where it failed
#   launch/worker.sh stop                SIGTERM to the job: it writes a checkpoint and ends with 75; another exit code of it is that of this
#   launch/worker.sh progress PLACE...   the checkpoints and shards that this machine sees at the places of launch/common.sh
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."
jobs=$HOME/.ldm_jax_jobs
last=$jobs/last

alive() { [ ! -e "$1/code" ] && [ -e "$1/pid" ] && grep -qs worker.sh "/proc/$(cat "$1/pid")/cmdline"; }

code() { # of the job in a directory; 137 of one that is gone without a word, with its machine perhaps
    if [ -e "$1/code" ]; then cat "$1/code"; else echo 137; fi
}

state() { # of the job in a directory
    if alive "$1"; then
        echo running
    elif [ -e "$1/stopped" ]; then
        echo "stopped:$(code "$1")"
    else
        code "$1"
    fi
}

end() { # of the job in a directory, within some seconds
    local i # and not _, which each command sets
    alive "$1" || return 0
    kill -TERM "$(cat "$1/pid")" 2>/dev/null || true
    for ((i = 0; i < $2; i++)); do
        alive "$1" || return 0
        sleep 1
    done
    kill -KILL -- "-$(cat "$1/pid")" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do
        alive "$1" || return 0
        sleep 0.1
    done
}

case ${1:-} in
    install)
        # Images of TPU machines have a Python that is too old, so uv fetches one.
        mkdir -p "$jobs"
        exec 9>"$jobs/install.lock" # a dropped connection ends no installation, beside which another would run
        flock 9
        if [ ! -x .venv/bin/pip ]; then # the last that a complete one gets
            rm -rf .venv
            python3 -m pip install --quiet --user uv
            python3 -m uv venv --quiet --seed --python '>=3.11' .venv
        fi
        make ACCELERATOR=tpu .venv/.tpu
        ;;
    start)
        mkdir -p "$jobs"
        job=$jobs/$2
        shift 2
        mkdir "$job" 2>/dev/null || exit 0
        if [ -e "$last" ]; then end "$last" "${GRACE:-180}"; fi
        shown "$@" >"$job/command"
        PATH=$PWD/.venv/bin:$PATH setsid nohup "$script" job "$job" "$@" >"$job/log" 2>&1 </dev/null 3>&- &
        echo $! >"$job/pid"
        ln -sfn "$job" "$last"
        ;;
    job) # the process that `start` leaves behind
        job=$2
        shift 2
        supervise
        spawn "$@"
        code=0
        await || code=$?
        echo $code >"$job/code.new"
        mv "$job/code.new" "$job/code"
        ;;
    status) if [ -e "$last" ]; then echo "$(state "$last") $(basename "$(readlink "$last")")"; else echo none; fi ;;
    command) cat "$last/command" ;;
    log) if [ -e "$jobs/$2/log" ]; then tail -c "+$(($3 + 1))" "$jobs/$2/log"; fi ;;
    fault)
        case $(state "$last") in 0 | running | stopped:*) exit 0 ;; esac
        echo "$(hostname): exit code $(state "$last")"
        tail -n 15 "$last/log"
        ;;
    follow) exec tail -n "$2" -F "$last/log" ;;
    stop)
        if [ -e "$last" ] && alive "$last"; then
            touch "$last/stopped"
            end "$last" "${GRACE:-180}"
            case $(code "$last") in 0 | 75) ;; *) exit "$(code "$last")" ;; esac
        fi
        ;;
    progress)
        shift
        printf '%s\n' "$@" | seen
        ;;
    *) usage ;;
esac
