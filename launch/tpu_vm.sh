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
# QUEUED=1         waits for capacity, in a queued resource of the same name; to be given with `delete` and `status` too
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
where=("$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
starts=0
imagined=NONE # the state of the slice, for DRY_RUN

pause() { if [ -z "${DRY_RUN:-}" ]; then sleep "$1"; fi; }

looked_up() { # a field of the slice or the queued resource: NONE where there is no such thing; other errors are gcloud's own
    if ! run gcloud compute tpus "$1" describe "${where[@]}" "--format=value($2)" 2>"$scratch/error"; then
        if grep -q NOT_FOUND "$scratch/error"; then
            echo NONE
        else
            cat "$scratch/error" >&2
            return 1
        fi
    fi
}

slice_state() { # of the slice, or of the queued resource that it waits in
    local queue=ACTIVE pretended
    if [ -n "${QUEUED:-}" ]; then
        pretended=${imagined/READY/ACTIVE}
        queue=$(looked_up queued-resources state.state) || return 1
    fi
    pretended=$imagined
    if [ "$queue" = ACTIVE ]; then looked_up tpu-vm state; else echo "$queue"; fi
}

create() {
    local image=${RUNTIME:-} flags
    if [ -z "$image" ]; then
        case $TYPE in
            v6e*) image=v2-alpha-tpuv6e ;;
            v5p*) image=v2-alpha-tpuv5 ;;
            v5lite*) image=v2-alpha-tpuv5-lite ;;
            v[234]-*) image=tpu-ubuntu2204-base ;;
            *) fail "TYPE=$TYPE: give RUNTIME, the version of its image" ;;
        esac
    fi
    read -ra flags <<<"${CREATE_FLAGS:-}"
    flags+=("--accelerator-type=$TYPE" ${SPOT:+--spot} ${RESERVED:+--reserved})
    if [ -n "${QUEUED:-}" ]; then
        run gcloud compute tpus queued-resources create "${where[@]}" "--node-id=$TPU" "--runtime-version=$image" "${flags[@]}"
    else
        run gcloud compute tpus tpu-vm create "${where[@]}" "--version=$image" "${flags[@]}"
    fi || return
    imagined=READY
}

delete() {
    if [ -n "${QUEUED:-}" ]; then
        run gcloud compute tpus queued-resources delete "${where[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
    fi
}

up() { # the slice is there and ready, a new one where the old one was taken away; gcloud's exit code where that fails
    local state seen='' created=''
    while :; do
        state=$(slice_state) || return 1
        if [ "$state" != "$seen" ]; then note "slice $TPU: $state"; fi
        seen=$state
        case $state in
            READY) return ;;
            NONE) create || return ;;
            STOPPED) run gcloud compute tpus tpu-vm start "${where[@]}" || return ;;
            FAILED)
                if [ -n "$created" ]; then
                    run gcloud compute tpus queued-resources describe "${where[@]}" >&2
                    return 1
                fi
                ;&
            PREEMPTED | TERMINATED | SUSPENDED) delete && create || return ;;
        esac
        case $state in NONE | FAILED | PREEMPTED | TERMINATED | SUSPENDED) created=1 ;; *) pause "${POLL:-20}" ;; esac
    done
}

ssh_to() { # a worker, or all, and a command; a connection that is dead is noticed
    run gcloud compute tpus tpu-vm ssh "${where[@]}" "--worker=$1" --quiet --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 \
        "--command=$2" </dev/null
}

on() { # a worker, or all, and what launch/worker.sh is to do there
    local worker=$1
    shift
    ssh_to "$worker" "$(shown "$repository/launch/worker.sh" "$@")"
}

insist() { # tries a command again that a fresh machine may refuse, as long as the slice is there
    local try
    for try in 1 2 3; do
        "$@" && return
        [ "$(slice_state)" = READY ] || return 1
        pause $((try * ${WAIT:-10}))
    done
    return 1
}

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
        insist ssh_to all "test -d $place || git clone --quiet $(shown "$GIT" "$repository"); cd $place && git fetch --quiet $(shown "$GIT" \
            "${REF:-HEAD}") && git checkout --quiet --force FETCH_HEAD" || return
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

watch() { # shows the log of job $id until its end, and returns its exit code: 75 where the slice was taken away
    local offset=0 missed=0 failed='' lines state verdict code
    while :; do
        if lines=$(pretended="0 $id" on all status 2>"$scratch/error"); then
            missed=0
            if on "${WORKER:-0}" log "$id" "$offset" >"$scratch/log" 2>/dev/null; then
                cat "$scratch/log"
                offset=$((offset + $(wc -c <"$scratch/log")))
            fi
            verdict=$(awk -v id="$id" '
                $1 == "none" || (NF == 2 && $2 != id) { $1 = 137 }
                $1 == "running" { running = 1 }
                $1 == "stopped" { stopped = 1 }
                $1 ~ /^[0-9]+$/ && $1 { if ($1 == 2 || ($1 == 75 && code != 2) || !code) code = $1 }
                END { print (running ? "running" : "over"), (stopped ? "stopped" : code + 0) }' <<<"$lines")
            code=${verdict#* }
            if [ "$verdict" = "over 0" ]; then return; fi
            if [ "$code" != 0 ]; then # somewhere; the others have some time to end
                : "${failed:=$SECONDS}"
                if [ "${verdict% *}" = over ] || [ $((SECONDS - failed)) -gt "${GRACE:-180}" ]; then break; fi
            fi
        else
            state=$(slice_state) || state=UNSEEN
            missed=$((missed + 1))
            case $state in
                READY | UNSEEN) # the network, for all that is known
                    if [ "$missed" -ge 30 ]; then
                        cat "$scratch/error" >&2
                        fail "$TPU cannot be reached; its job, if it still runs, is left alone" 1
                    fi
                    ;;
                *)
                    note "slice $TPU: $state"
                    return 75
                    ;;
            esac
        fi
        pause "${POLL:-20}"
    done
    if [ "$code" = stopped ]; then
        note "the job was stopped"
        exit 75
    fi
    state=$(slice_state) || state=UNSEEN
    if [ "$state" != READY ]; then # what the job said last has its reason in that
        note "slice $TPU: $state"
        return 75
    fi
    if [ "${verdict% *}" = running ]; then on all stop || true; fi
    if [ "$code" -ne 75 ]; then on all fault >&2 || true; fi
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
        workdir=$(given --workdir "$@")
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
        if [ "$code" -eq 0 ] && [ -n "${DELETE:-}" ]; then delete; else note "slice $TPU is kept, and costs money until \`$0 delete\`"; fi
        exit "$code"
        ;;
esac
