#!/usr/bin/env bash
# Starts a job on GKE, on a TPU slice or on hosts with GPUs, from an image of launch/Dockerfile: fills in launch/gke_jobset.yaml and applies it.
# The cluster has JobSet, and a node pool that fits; kubectl points to it.
#
#   NAME=run IMAGE=region-docker.pkg.dev/project/repository/ldm_jax:tpu SLICE=v5e:16x16 CLAIM=laion \
#     launch/gke.sh python -m ldm_jax.train --config configs/txt2img.py:laion-1p4b --workdir gs://bucket/run \
#     --config.first_stage.path=gs://bucket/kl-f8 --config.data.path=/data --config.train.batch_size=2048 --config.mesh.fsdp=8
#   NAME=run IMAGE=...:cuda GPU=nvidia-h100-80gb HOSTS=4 launch/gke.sh python -m ldm_jax.train ...
#
# SLICE=v4|v5e|v5p|v6e:TOPOLOGY; CHIPS: of a host (4; 8 where that is all of a slice). GPU: a value of the label cloud.google.com/gke-accelerator;
# GPUS: of a host (8), which one process drives. SPOT=1: spot nodes alone. SERVICE_ACCOUNT (default): of the pods. CLAIM: a
# PersistentVolumeClaim with the data, which all pods see at /data.
# After 75, preemption and maintenance the job starts again without limit, after a fault RETRIES times (10), after 2 never. XLA_FLAGS,
# LIBTPU_INIT_ARGS and LDM_* go to all hosts. DRY_RUN=1 prints the command and what it would apply.

# The manifest's variables are read by their names.
# shellcheck disable=SC2034,SC2153
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || usage
for name in NAME IMAGE; do [ -n "${!name:-}" ] || fail "$name is not set"; done

json() { # a string
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//$'\n'/\\n}"
}

wrong_slice() { fail "SLICE=$SLICE: v4, v5e, v5p or v6e, a colon and the topology of one slice, such as v5e:16x16"; }

listed() { # JSON values, with commas between them
    local IFS=,
    echo "$*"
}

command=("$@")
if [ -n "${SLICE:-}" ]; then
    [[ $SLICE =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || wrong_slice # one slice: a job of several has another manifest
    topology=${SLICE#*:}
    chips=$((${topology//x/*}))
    case ${SLICE%%:*} in
        v4) kind=tpu-v4-podslice ;;
        v5e) kind=tpu-v5-lite-podslice ;;
        v5p) kind=tpu-v5p-slice ;;
        v6e) kind=tpu-v6e-slice ;;
        *) wrong_slice ;;
    esac
    case $kind,$chips in
        *lite*,[1-8] | *v6e*,[1-8]) per_host=${CHIPS:-$chips} ;;
        *) per_host=${CHIPS:-4} ;;
    esac
    if ! [[ $per_host =~ ^[1-9][0-9]*$ ]] || [ $((chips % per_host)) -ne 0 ]; then fail "CHIPS=$per_host: not a part of $chips chips"; fi
    HOSTS=$((chips / per_host))
    NODES="\"cloud.google.com/gke-tpu-accelerator\": \"$kind\", \"cloud.google.com/gke-tpu-topology\": \"$topology\""
    LIMITS="{\"google.com/tpu\": $per_host}"
    ANNOTATIONS='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}' # all hosts in one slice
    USER_ID=0                                                                                     # whom the devices belong to
elif [ -n "${GPU:-}" ]; then
    HOSTS=${HOSTS:-1}
    NODES="\"cloud.google.com/gke-accelerator\": \"$GPU\""
    LIMITS="{\"nvidia.com/gpu\": ${GPUS:-8}}"
    ANNOTATIONS='{}'
    USER_ID=1000
    if [ "$HOSTS" -gt 1 ]; then
        # shellcheck disable=SC2016 # Kubernetes fills it in
        command+=(--coordinator "$NAME-host-0-0.$NAME:12321" --num-processes "$HOSTS" --process-id '$(PROCESS_ID)')
    fi
else
    fail "give SLICE, such as v5e:16x16, or GPU"
fi
RETRIES=${RETRIES:-10}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
MOUNTS='[{"name": "shm", "mountPath": "/dev/shm"}'${CLAIM:+', {"name": "data", "mountPath": "/data"}'}]
VOLUMES='[{"name": "shm", "emptyDir": {"medium": "Memory"}}'${CLAIM:+", {\"name\": \"data\", \"persistentVolumeClaim\": {\"claimName\": \"$CLAIM\"}}"}]
NODES="{$NODES${SPOT:+, \"cloud.google.com/gke-spot\": \"true\"}}"

words=()
for word in "${command[@]}"; do words+=("$(json "$word")"); done
COMMAND="[$(listed "${words[@]}")]"
words=('{"name": "PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['"'batch.kubernetes.io/job-completion-index'"']"}}}')
for name in XLA_FLAGS LIBTPU_INIT_ARGS ${!LDM_@}; do
    if [ -n "${!name:-}" ]; then words+=("{\"name\": \"$name\", \"value\": $(json "${!name}")}"); fi
done
ENV="[$(listed "${words[@]}")]"

manifest=$(grep -v '^#' "$(dirname "$script")/gke_jobset.yaml")
for name in NAME IMAGE HOSTS NODES LIMITS ANNOTATIONS USER_ID RETRIES SERVICE_ACCOUNT MOUNTS VOLUMES COMMAND ENV; do
    manifest=${manifest//"\${$name}"/"${!name}"}
done
run kubectl apply -f - <<<"$manifest"
if [ -n "${DRY_RUN:-}" ]; then
    echo "$manifest"
else
    note "started; its state:  kubectl get jobset $NAME"
    note "its log:             kubectl logs --follow --selector jobset.sigs.k8s.io/jobset-name=$NAME,batch.kubernetes.io/job-completion-index=0"
    note "its end:             kubectl delete jobset $NAME"
fi
