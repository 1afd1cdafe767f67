#!/usr/bin/env bash
# Runs a job on a Cloud TPU slice until it is finished: makes the slice, installs this checkout on all its workers, starts the command on all of
# them at once, shows worker 0's log, and after a preemption makes the slice and starts the job anew.
#
#   export TPU=name ZONE=us-west4-a TYPE=v5litepod-256
#   launch/tpu_vm.sh run python -m ldm_jax.train --config configs/txt2img.py:laion-1p4b --workdir gs://bucket/run \
#     --config.first_stage.path=gs://bucket/kl-f8 --config.data.path=/mnt/laion --config.train.batch_size=2048 --config.mesh.fsdp=8
#   launch/tpu_vm.sh status | logs | stop | delete      # stop: SIGTERM, which leaves a checkpoint; the same `run` goes on from it
#   launch/tpu_vm.sh up                                 # the slice and the installation alone
#
# PROJECT          of the slice, where it is not gcloud's own
# SPOT=1           spot capacity; RESERVED=1: of a reservation
# QUEUED=1         waits for capacity, in a queued resource of the same name
# RUNTIME          version of the machines' image (by TYPE); CREATE_FLAGS: more flags of `gcloud compute tpus ... create`
# GIT=URL REF=ref  clones that, instead of copying this checkout with its uncommitted files
# REPOSITORY       where it goes, in the home directory of the workers (ldm_jax)
# DELETE=1         deletes the slice once the job is finished
# WORKER=n         whose log is shown (0; of `logs` also all); POLL: seconds between looks (20); GRACE: for a checkpoint after SIGTERM (180)
#
# The command gets `--coordinator auto`, and XLA_FLAGS, LIBTPU_INIT_ARGS and LDM_* go to all workers. The job does not depend on this script: after
# Ctrl-C or a lost connection it runs on, and the same `run` attaches to it. Exit codes and restarts: launch/common.sh. A slice that is kept
# costs money until `delete`.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
verb=${1:-}
case $verb in up | run | status | logs | stop | delete) shift ;; *) usage ;; esac
if [ "$verb" = run ] && [ $# -eq 0 ]; then usage; fi
for name in TPU ZONE; do [ -n "${!name:-}" ] || fail "$name is not set"; done
if [ "$verb" = run ] && [ "${WORKER:-}" = all ]; then fail "WORKER=all is for \`logs\`"; fi
if [ "$verb" = run ] || [ "$verb" = up ]; then [ -n "${TYPE:-}" ] || fail "TYPE is not set; for example v5litepod-16"; fi

root=$(dirname "$(dirname "$script")")
repository=${REPOSITORY:-ldm_jax}
starts=0
# shellcheck source=launch/tpu_slice.sh
. "$(dirname "$script")/tpu_slice.sh"

files() { # of this checkout: what is tracked, and what is new and not ignored
    local name
    git -C "$root" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' name; do
        if [ -e "$root/$name" ]; then printf '%s\0' "$name"; fi
    done
}

install() {
    local place
    place=$(shown "$repository")
    if [ -n "${GIT:-}" ]; then
        # One at a time, as a dropped connection does not end what it began.
        insist ssh_to all "exec 9>.ldm_jax.lock && flock 9 && { test -d $place || git clone --quiet $(shown "$GIT" "$repository"); } && cd $place && \
            git fetch --quiet $(shown "$GIT" "${REF:-HEAD}") && git checkout --quiet --force FETCH_HEAD" || return
    else
        files >"$scratch/files" || fail "$root is no git checkout: give GIT=URL"
        run tar -C "$root" --null -czf "$scratch/ldm_jax.tar.gz" -T "$scratch/files" || return
        insist run gcloud compute tpus tpu-vm scp "$scratch/ldm_jax.tar.gz" "$TPU:ldm_jax.tar.gz" "${where[@]:1}" --worker=all --quiet || return
        insist ssh_to all "mkdir -p $place && tar -xzf ldm_jax.tar.gz -C $place" || return
    fi
    insist on all install
}

attach() { # sets $id to that of the job, which runs already or is started now
    local said name given=() there
    there=$(shown "$repository/launch/worker.sh")
    said=$(pretended=none insist ssh_to 0 "test ! -e $there || $there status") || return # a job may run, which `start` would end
    said=${said##*$'\n'}
    if [ "${said%% *}" = running ]; then
        id=${said#* }
        said=$(insist on 0 command) || return
        said=${said##*$'\n'}
        [ "$said" = "$(shown "$@")" ] || fail "another job runs on $TPU: $said"
        note "attached to job $id, which runs already"
        return
    fi
    install || return
    id=$(date +%Y%m%d-%H%M%S)-$$-$((++starts))
    for name in XLA_FLAGS LIBTPU_INIT_ARGS ${!LDM_@}; do if [ -n "${!name:-}" ]; then given+=("$name=${!name}"); fi; done
    note "starts job $id on all workers of $TPU"
    insist ssh_to all "$(shown env "GRACE=${GRACE:-180}" "${given[@]}" "$repository/launch/worker.sh" start "$id" "$@")"
}

# What is shown of a signal would follow the redirections of a function that it comes in; not those of a subshell.
show_log() { # what is new of job $id
    (on "${WORKER:-0}" log "$id" "$offset") >"$scratch/log" 2>/dev/null || return 0
    cat "$scratch/log"
    offset=$((offset + $(wc -c <"$scratch/log")))
}

judge() { # of what the workers answer: silent, running or over, the exit code of the job so far, and whether somebody stopped it
    awk -v id="$id" '
        NF == 1 && $1 == "none" { $0 = "137 " id }
        NF != 2 { next }
        { answers++ }
        $2 != id { $1 = 137 }
        sub(/^stopped:/, "", $1) { stopped = "stopped" }
        $1 == "running" { running++ }
        $1 ~ /^[0-9]+$/ && $1 { if ($1 == 2 || ($1 == 75 && code != 2) || !code) code = $1 }
        END { print (!answers ? "silent" : running ? "running" : "over"), code + 0, stopped }'
}

watch() { # shows the log of job $id until its end, and returns its exit code: 75 where the slice was taken away, or lost a worker
    local offset=0 missed=0 ended='' all answers state now code stopped
    while :; do
        all=1
        answers=$(pretended="0 $id" on all status 2>"$scratch/error") || all=
        show_log
        read -r now code stopped < <(judge <<<"$answers")
        state=READY
        if [ -z "$all" ]; then state=$(slice_state) || state=UNSEEN; fi
        case $state in
            READY | UNSEEN) ;; # the network, or a worker is lost
            *) break ;;
        esac
        if [ -n "$all" ] && [ "$now" = over ]; then break; fi
        if [ "$now" = over ] || [ "$code" -ne 0 ]; then # somewhere; the others have some time to end, or to answer
            : "${ended:=$SECONDS}"
            if [ $((SECONDS - ended)) -gt "${GRACE:-180}" ]; then break; fi
        fi
        if [ "$now" = silent ]; then missed=$((missed + 1)); else missed=0; fi
        if [ "$missed" -ge "$looks" ]; then
            cat "$scratch/error" >&2
            fail "$TPU cannot be reached; its job, if it still runs, is left alone" 1
        fi
        pause "${POLL:-20}"
    done
    if [ -n "$stopped" ] && [ "$code" -ne 0 ]; then
        if [ "$code" -eq 75 ]; then note "the job was stopped"; else note "the job was stopped, and ended with exit code $code"; fi
        exit "$code"
    fi
    if [ "$now $code" = "over 0" ]; then return; fi
    if [ "$state" = READY ]; then state=$(slice_state) || state=UNSEEN; fi
    if [ "$state" != READY ]; then # what the job said last has its reason in that
        note "slice $TPU: $state"
        return 75
    fi
    if [ "$now" = running ]; then on all stop || true; fi
    if [ "$code" -ne 75 ]; then on all fault >&2 || true; fi
    if [ -z "$all" ] && [ "$code" -ne 2 ]; then
        cat "$scratch/error" >&2
        note "slice $TPU: $state, but not all of its workers answer: a new one is made"
        delete || true
        return 75
    fi
    return "$code"
}

reached() { # as `progress`, of what only the workers see too
    local here
    { places "$@" | grep :// || true; } | seen
    mapfile -t here < <(places "$@" | grep -v ://)
    if [ ${#here[@]} -gt 0 ]; then on 0 progress "${here[@]}" || true; fi
}

case $verb in
    up) up && install ;;
    status) slice_state && on all status ;;
    logs) on "${WORKER:-0}" follow 100 ;;
    stop) ssh_to all "$(shown env "GRACE=${GRACE:-180}" "$repository/launch/worker.sh" stop)" ;;
    delete) delete ;;
    run)
        workdir=$(flag --workdir "$@")
        case $workdir in
            *://*) ;;
            *) note "--workdir ${workdir:-} is no gs:// path: unless it is mounted on all workers, it is lost with the slice" ;;
        esac
        trap 'note "this script ends; the job, if it was started, runs on: the same command attaches to it, \`stop\` ends it"; exit 130' INT TERM
        started=
        while :; do
            code=0
            up || code=$?
            if [ "$code" -ne 0 ]; then
                [ -n "$started" ] || exit "$code"
                code=75 # no capacity for now
            elif attach "$@" --coordinator auto; then
                if advanced "$(reached "$@")"; then fruitless=0; fi # where a slice is lost, its successor sees what it had reached
                started=1
                watch || code=$?
            else
                [ "$(slice_state)" != READY ] || exit 1
                code=75
            fi
            again "$code" "$(reached "$@")" || break
        done
        if [ "$code" -eq 0 ] && [ -n "${DELETE:-}" ]; then delete; fi
        exit "$code"
        ;;
esac
