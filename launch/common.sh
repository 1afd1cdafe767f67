# shellcheck shell=bash
# What the launchers share; sourced, not run.
#
# DRY_RUN=1 prints each command and runs none. Exit codes of a job: 0 finished, 2 bad input, 75 stopped with a complete checkpoint (start it
# again), anything else a fault. A job is started again after 75, and after its machine was taken away, RESTARTS times (10), after a fault
# RETRIES times (3), with waits of WAIT seconds (10) that double up to ten minutes; each new checkpoint sets count and wait back.

unset CDPATH
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
exec 3>&1 # where DRY_RUN prints, also from within $(...)

usage() { # prints the header of the script and ends with exit code 2
    awk 'NR > 1 && !/^#/ { exit } NR > 1' "$script" | grep -v '^#SBATCH' | sed 's/^# \{0,1\}//' >&2
    exit 2
}

note() { echo "$(basename "$script"): $*" >&2; }

fail() { # a message, and the exit code where it is not 2
    note "error: $1"
    exit "${2:-2}"
}

shown() { # a command as it would be typed
    local word words=''
    for word in "$@"; do
        if [[ ! $word =~ ^[a-zA-Z0-9_./:=,@%+-]+$ ]]; then word=${word@Q}; fi
        words+=" $word"
    done
    echo "${words# }"
}

run() { # a command; with DRY_RUN its text, and on standard output $pretended
    if [ -z "${DRY_RUN:-}" ]; then
        "$@"
    else
        shown "$@" >&3
        if [ -n "${pretended:-}" ]; then echo "$pretended"; fi
    fi
}

# Processes in the background: `supervise` once, `spawn COMMAND...` for each, `await` for all of them. SIGTERM, SIGINT and SIGUSR1 to the script
# reach them as SIGTERM (`forward`, which a script may replace), and $signalled is the last that came. `await` returns what became of them
# together: 2 where one ended with 2, else 75 where one did, else the first code that is not 0.
children=()
signalled=
interrupted=
forward() { if [ ${#children[@]} -gt 0 ]; then kill -TERM "${children[@]}" 2>/dev/null || true; fi; }
heard() {
    signalled=$1
    interrupted=1
    forward
}
supervise() {
    trap 'heard TERM' TERM
    trap 'heard INT' INT
    trap 'heard USR1' USR1
}
spawn() {
    if [ -n "${DRY_RUN:-}" ]; then set -- shown "$@"; fi
    background "$@"
}
background() {
    "$@" &
    children+=($!)
    if [ -n "$signalled" ]; then forward; fi # it came before the child was known
}
await() {
    local pid code ended=0
    for pid in "${children[@]}"; do
        while :; do
            interrupted=
            code=0
            wait "$pid" || code=$?
            [ -n "$interrupted" ] || break # a signal ends `wait`, not the child
        done
        case $code,$ended in
            2,* | *,0) ended=$code ;;
            75,2) ;;
            75,*) ended=75 ;;
        esac
    done
    children=()
    return "$ended"
}

# What starts a command in all tasks of a Slurm job. Processes that fail or stop end the others themselves, with their exit code and in good
# order, where srun would kill them. It does not take the number of cores from sbatch by itself.
# shellcheck disable=SC2034 # for scripts of Slurm
slurm_step=(srun --kill-on-bad-exit=0 --wait=60 ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"})

flag() { # the value of a flag among arguments
    local name=$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
            "$name"=*) echo "${1#*=}" && return ;;
            "$name") echo "${2:-}" && return ;;
        esac
        shift
    done
}

places() { # where a command leaves checkpoints and the shards of caches, one a line
    local workdir latents
    workdir=$(flag --workdir "$@")
    latents=$(flag --config.data.latents "$@")
    if [ -n "$workdir" ]; then printf '%s\n' "$workdir/checkpoints" "$workdir/first_stage/checkpoints"; fi
    if [ -n "$workdir$latents" ]; then echo "${latents:-$workdir/latents}/*/shard-*"; fi
}

seen() { # of the places on standard input, the checkpoints and shards that there are; nothing where that cannot be seen
    local place
    while IFS= read -r place; do
        case $place in
            *://*) run gcloud storage ls "$place" 2>/dev/null ;; # one a call, which ends at the first without objects
            *) find "${place%'/*/shard-*'}" -maxdepth 2 2>/dev/null ;;
        esac | grep -E '/([0-9]+/?|shard-[^/]*)$' || true
    done
}

progress() { places "$@" | seen; } # of a command

before= # what `progress` has said so far
advanced() { # whether it says something new now
    local new
    new=$(grep -vxF -f <(echo "$before") <<<"$1") || true
    before+=${new:+$'\n'$new}
    [ -n "$new" ]
}

# Whether a job that ended with a code is to be started again, after the wait that is due; its second argument is what `progress` says.
fruitless=0
again() {
    local limit=${RETRIES:-3}
    case $1 in
        0 | 2) return 1 ;;
        75) limit=${RESTARTS:-10} ;;
    esac
    if advanced "$2"; then fruitless=0; fi
    if [ "$fruitless" -ge "$limit" ]; then
        note "exit code $1 after $fruitless restarts without a new checkpoint: given up"
        return 1
    fi
    local pause=$((${WAIT:-10} << (fruitless < 6 ? fruitless : 6)))
    if [ "$pause" -gt 600 ]; then pause=600; fi
    fruitless=$((fruitless + 1))
    note "exit code $1; starts again in $pause s (restart $fruitless of $limit without a new checkpoint)"
    sleep "$pause" &
    wait $! || true # which signals end
    [ -z "$signalled" ]
}
