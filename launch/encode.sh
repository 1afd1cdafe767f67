#!/usr/bin/env bash
# Makes the latent cache of a run whose first stage is complete, on one machine, on nodes of a Slurm cluster or on a TPU slice.
#
#   launch/encode.sh --config configs/txt2img.py:laion-1p4b --workdir runs/laion \
#     --config.first_stage.path=models/kl-f8 --config.data.path=/data/laion                      # here; PROCESSES=8: one a GPU
#   SLURM="--nodes=8 --time=12:00:00" launch/encode.sh --config ... --workdir /shared/runs/laion # submits a job
#   TPU=name ZONE=zone TYPE=v5litepod-64 launch/encode.sh --config ... --workdir ...             # makes and feeds a slice
#
# Process p of P writes shards p, p + P, p + 2P, ... of those that are not there; a shard appears whole or not at all, so a job that was killed
# goes on where it was, also with other numbers of processes. The cache lies in the work directory, or in --config.data.latents=DIR, which all
# machines must see: on a shared file system, or on gs://. Training then finds it there. Started again as by launch/gpu_host.sh, slurm.sbatch and
# tpu_vm.sh, whose variables apply. DRY_RUN=1: launch/common.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"
[ $# -gt 0 ] || usage
here=$(dirname "$script")
command=(python -m ldm_jax.encode "$@")
if [ -n "${TPU:-}" ]; then
    exec "$here/tpu_vm.sh" run "${command[@]}"
elif [ -n "${SLURM:-}" ]; then
    read -ra flags <<<"$SLURM"
    cd "$here/.."
    run sbatch "${flags[@]}" launch/slurm.sbatch "${command[@]}"
else
    exec "$here/gpu_host.sh" "${command[@]}"
fi
