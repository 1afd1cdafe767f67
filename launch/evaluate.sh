#!/usr/bin/env bash
# Evaluates every checkpoint of a run once, while it trains or afterwards: on one machine, as a Slurm job, or on a TPU slice.
#
#   launch/evaluate.sh RUN [flags of `python -m ldm_jax.evaluate`, such as --num 5000 --reference statistics.npz]
#   sbatch --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 launch/evaluate.sh RUN ...     # a process a GPU
#   TPU=name ZONE=zone [PROJECT=project] [REPOSITORY=ldm_jax] launch/evaluate.sh RUN ...
#
# Reports go to RUN/reports/STEP, and RUN/reports/model for the finished model. The job looks for new checkpoints every INTERVAL seconds (300)
# and ends once the finished model is evaluated, or with ONCE=1 once all is evaluated that there is now. Checkpoints that are thinned out
# before (checkpoint.keep) are missed; of an autoencoder's run the finished model alone is evaluated. A job that was killed goes on where it
# was when it is started again. What fails is tried again at the next look, three times in all (RUN/reports/failed.txt); exit code 1 says
# that something has no report. Give --reference statistics.npz (--write-reference), or the data are measured anew for each checkpoint.
# All machines see RUN on a file system, and have the repository, with its .venv or PYTHON, at the same place; LDM_* and PYTHON go to them. DRY_RUN=1 prints each
# command for a run of which the finished model is to be evaluated, and runs none.
set -euo pipefail
root=${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}
# shellcheck source=launch/common.sh
. "$root/launch/common.sh"
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then usage; fi
run=$1
shift
case $run in
    *://*) fail "$run: mount the bucket (gcsfuse) and give that path, or name checkpoints: python -m ldm_jax.evaluate --model $run --step N" ;;
esac
if [ -z "${TPU:-}" ] && [ "${run#/}" = "$run" ]; then run=$PWD/$run; fi
cd "$root"

# on_one: a shell script and its arguments, on one machine that sees the run; on_all: the same on every machine of the job, at once, in the
# place of the shell that it is called in.
become() {
    if [ -z "${DRY_RUN:-}" ]; then exec "$@"; fi
    run "$@"
}
if [ -n "${TPU:-}" ]; then
    coordinator=(--coordinator auto)
    remote() {
        local worker=$1 name given=
        shift
        for name in PYTHON ${!LDM_@}; do given+=$(printf '%s=%q ' "$name" "${!name:-}"); done
        "${in_place:-run}" gcloud compute tpus tpu-vm ssh "$TPU" --zone="${ZONE:?give ZONE}" ${PROJECT:+--project="$PROJECT"} --worker="$worker" \
            --command="cd $(printf %q "${REPOSITORY:-ldm_jax}") && $given $(printf '%q ' bash -c "$@")"
    }
    on_one() { remote 0 "$@"; }
    on_all() { in_place='become' remote all "$@"; }
elif [ -n "${SLURM_JOB_ID:-}" ]; then
    coordinator=()
    on_one() { run bash -c "$@"; }
    on_all() { become "${slurm_step[@]}" bash -c "$@"; }
else
    coordinator=()
    on_one() { run bash -c "$@"; }
    on_all() { become bash -c "$@"; }
fi

# What there is: "finished" where the run is; "todo NAME" without a report, the oldest first; "failed NAME" that has failed three times.
# shellcheck disable=SC2016 # they are for the shell there
look='
cd "$1" || exit 2
names=
if ! grep -q "\"task\": \"autoencoder\"" config.json 2>/dev/null; then
    names=$(ls checkpoints 2>/dev/null | grep -x "[0-9][0-9]*" | sort -n)
fi
if [ -e model/model.json ]; then
    echo finished
    # The checkpoint of its last update is the model itself.
    last=$(grep -o "\"step\": *[0-9]*" model/model.json | grep -o "[0-9]*$" | head -n 1)
    names="$(echo "$names" | grep -vx "$last") model"
fi
for name in $names; do
    if [ -e "reports/$name/report.json" ]; then continue; fi
    failures=$(cat reports/failed.txt 2>/dev/null | grep -c "^$name ")
    if [ "$failures" -lt 3 ]; then echo "todo $name"; else echo "failed $name"; fi
done
exit 0'

# shellcheck disable=SC2016
evaluate='
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" -m ldm_jax.evaluate "$@"'

# shellcheck disable=SC2016
failure='mkdir -p "$1/reports" && echo "$2" >> "$1/reports/failed.txt"'

supervise
waiting() { # a command and its arguments; a signal goes to it, and ends the script after it
    background "$@"
    local code=0
    await || code=$?
    [ -z "$signalled" ] || exit 143
    return "$code"
}

while :; do
    mapfile -t lines < <(pretended=$'finished\ntodo model' on_one "$look" look "$run" || echo unseen)
    if [ "${lines[*]: -1}" = unseen ]; then
        echo "error: $run cannot be looked at" >&2
        exit 2
    fi
    finished=
    failed=
    for line in "${lines[@]}"; do
        name=${line#* }
        case $line in
            finished) finished=1 && continue ;;
            failed*) failed=${failed:-no} && continue ;;
            "todo model") which=() ;;
            todo*) which=(--step "$name") ;;
            *) continue ;;
        esac
        echo "evaluating $run, $name"
        code=0
        waiting on_all "$evaluate" evaluate --model "$run" --output "$run/reports/$name" "${which[@]}" "${coordinator[@]}" "$@" </dev/null ||
            code=$?
        [ "$code" -eq 0 ] && continue
        failed=again
        case $code in 75 | 255) continue ;; esac # it was stopped, or a connection broke: it goes on
        echo "$name failed with exit code $code" >&2
        on_one "$failure" failure "$run" "$name failed with exit code $code" </dev/null
    done
    if [ -n "${ONCE:-}" ] || { [ -n "$finished" ] && [ "$failed" != again ]; }; then
        break
    fi
    waiting sleep "${INTERVAL:-300}"
done
[ -z "$failed" ]
