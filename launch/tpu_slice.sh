# shellcheck shell=bash disable=SC2034,SC2154 # variables that come from, and go to, tpu_vm.sh
# The slice of launch/tpu_vm.sh, which sources this: what state it is in, making and deleting it, commands on its workers.

where=("$TPU" "--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})
scratch=$(mktemp -d)
trap leave EXIT
kept= # set once there is a slice, or a request for one, until it is deleted
looks=30 # that may fail in a row, as the network does
imagined=NONE # the state of the slice, for DRY_RUN

leave() {
    rm -rf "$scratch"
    if [ -n "$kept" ]; then
        note "slice $TPU is kept, and costs money until \`$(shown env "TPU=$TPU" "ZONE=$ZONE" ${PROJECT:+"PROJECT=$PROJECT"} "$0" delete)\`"
    fi
}

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

queue_state() { # of the queued resource
    local pretended=NONE
    if [ -n "${QUEUED:-}" ]; then pretended=${imagined/READY/ACTIVE}; fi
    looked_up queued-resources state.state
}

slice_state() { # of the slice, or of the queued resource that it waits in
    local queue=ACTIVE pretended=$imagined
    if [ -n "${QUEUED:-}" ] || [ "$verb" = status ]; then queue=$(queue_state) || return 1; fi
    case $queue,${QUEUED:-} in
        ACTIVE,* | NONE,) looked_up tpu-vm state ;;
        *) echo "$queue" ;;
    esac
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
    fi || { # which need not mean that nothing was created
        if [ "$(slice_state)" != NONE ]; then kept=1; fi
        return 1
    }
    imagined=READY
    kept=1
}

delete() { # of a slice that came by a queued resource, that too
    local queue
    queue=$(queue_state) || return
    if [ "$queue" != NONE ]; then
        run gcloud compute tpus queued-resources delete "${where[@]}" --force --quiet
    else
        run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
    fi || return
    imagined=NONE
    kept=
}

up() { # the slice is there and ready, a new one where the old one was taken away; not 0 where that fails
    local state seen='' created='' missed=0
    while :; do
        if ! state=$(slice_state); then
            missed=$((missed + 1))
            if [ -z "$kept" ] || [ "$missed" -ge "$looks" ]; then return 1; fi
            pause "${POLL:-20}"
            continue
        fi
        missed=0
        if [ "$state" != NONE ]; then kept=1; fi
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
