#!/usr/bin/env bash
# Evaluates every checkpoint of a run once, while it trains or afterwards: on one machine, as a Slurm job, or on a TPU slice.
#
#   launch/evaluate.sh RUN [flags of `python -m ldm_jax.evaluate`, such as --num 5000 --reference statistics.npz]
#   sbatch --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 launch/evaluate.sh RUN ...
#   TPU=name ZONE=zone [PROJECT=project] [REPOSITORY=ldm_jax] launch/evaluate.sh RUN ...
#
# Reports go to RUN/reports/STEP, and RUN/reports/model for the finished model. The job looks for new checkpoints every INTERVAL seconds (300)
# and ends once the finished model is evaluated, or with ONCE=1 once all is evaluated that there is now. A job that was killed goes on where
# it was when it is started again. What fails is tried again at the next look, three times in all (RUN/reports/failed.txt).
# All machines see RUN, and have the repository, with its .venv or PYTHON, at the same place.
set -euo pipefail

if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,12p' "$0" | sed 's/^# \{0,1\}//' >&2
    exit 2
fi
run=$1
shift
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"

# on_one: a shell script and its arguments, on one machine that sees the run; on_all: the same on every machine of the job, at once.
if [ -n "${TPU:-}" ]; then
    coordinator=(--coordinator auto)
    remote() {
        local worker=$1
        shift
        gcloud compute tpus tpu-vm ssh "$TPU" --zone="${ZONE:?give ZONE}" ${PROJECT:+--project="$PROJECT"} --worker="$worker" \
            --command="cd ${REPOSITORY:-ldm_jax} && $(printf '%q ' bash -c "$@")"
    }
    on_one() { remote 0 "$@"; }
    on_all() { remote all "$@"; }
elif [ -n "${SLURM_JOB_ID:-}" ]; then
    coordinator=()
    on_one() { bash -c "$@"; }
    on_all() { srun --kill-on-bad-exit=1 bash -c "$@"; }
else
    coordinator=()
    on_one() { bash -c "$@"; }
    on_all() { bash -c "$@"; }
fi

# What is to be done: the names without a report that did not fail three times, the oldest first; "finished" first where the run is.
look='
cd "$1" || exit 2
if [ -e model/model.json ]; then echo finished; fi
names=$(ls checkpoints 2>/dev/null | grep -x "[0-9][0-9]*" | sort -n)
if [ -e model/model.json ]; then names="$names model"; fi
for name in $names; do
    failures=$(cat reports/failed.txt 2>/dev/null | grep -c "^$name ")
    if [ ! -e "reports/$name/report.json" ] && [ "$failures" -lt 3 ]; then echo "$name"; fi
done
exit 0'

evaluate='
python=${PYTHON:-python}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
exec "$python" -m ldm_jax.evaluate "$@"'

note='mkdir -p "$1/reports" && echo "$2" >> "$1/reports/failed.txt"'

while :; do
    mapfile -t names < <(on_one "$look" look "$run" || echo unseen)
    if [ "${names[*]: -1}" = unseen ]; then
        echo "error: $run cannot be looked at" >&2
        exit 2
    fi
    finished=
    failed=
    for name in "${names[@]}"; do
        case $name in
            finished) finished=1 && continue ;;
            model) which=() ;;
            *) which=(--step "$name") ;;
        esac
        echo "evaluating $run, $name"
        on_all "$evaluate" evaluate --model "$run" --output "$run/reports/$name" "${which[@]}" "${coordinator[@]}" "$@" </dev/null && continue
        failed="$name failed with exit code $?"
        echo "$failed" >&2
        on_one "$note" note "$run" "$failed" </dev/null
    done
    if [ -n "${ONCE:-}" ] || { [ -n "$finished" ] && [ -z "$failed" ]; }; then
        break
    fi
    sleep "${INTERVAL:-300}"
done
[ -z "$failed" ]
