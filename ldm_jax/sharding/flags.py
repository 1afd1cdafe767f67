"""The settings of XLA and its libraries that matter for this project, in one place; what the user has set stays.

They are put into the environment before jax starts, by every command. An unknown flag ends a process, so only those are here that all
versions of `requirements.txt` know. To try others, set XLA_FLAGS or LIBTPU_INIT_ARGS: these are added to, flag by flag.
"""

import re
from collections.abc import MutableMapping
from pathlib import Path

# TPU. Collectives run beside the mathematics: parameters of later layers are gathered, and gradients of earlier ones summed, while a layer
# computes. Fusing the gathers is libtpu's default on v5e and later; sums in the background, and across slices, are not.
LIBTPU_INIT_ARGS = {
    "--xla_tpu_enable_async_collective_fusion": "true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "--xla_tpu_overlap_compute_collective_tc": "true",
    "--xla_enable_async_all_gather": "true",
    "--xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "--xla_tpu_data_parallel_opt_different_sized_ops": "true",
}

# NVIDIA GPUs. The scheduler that hides latencies lets gradients cross NVLink or the network while earlier layers still compute; sums of up
# to 128 MiB go together, which is large enough for bandwidth and small enough that several of them overlap with the backward pass.
XLA_FLAGS = {
    "--xla_gpu_enable_latency_hiding_scheduler": "true",
    "--xla_gpu_all_reduce_combine_threshold_bytes": str(2**27),
}

# JAX takes three quarters of a GPU's memory by default, which leaves 35 GB of an H200 unused. CUDA keeps the order of launches that the
# scheduler chose only if it has one queue.
GPU_ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

_NVIDIA = Path("/proc/driver/nvidia/version")


def with_flags(given: str, flags: dict[str, str]) -> str:
    """What the user has given, and of `flags` those that it does not name."""
    named = set(re.findall(r"--\w+", given))
    return " ".join([*([given] if given else []), *(f"{name}={value}" for name, value in flags.items() if name not in named)])


def set_environment(env: MutableMapping[str, str], nvidia: bool | None = None) -> None:
    """Completes an environment before jax is imported: libtpu's flags always, as nothing else reads them, and those of GPUs where there
    is an NVIDIA driver (`nvidia`: None looks for one)."""
    env["LIBTPU_INIT_ARGS"] = with_flags(env.get("LIBTPU_INIT_ARGS", ""), LIBTPU_INIT_ARGS)
    if _NVIDIA.exists() if nvidia is None else nvidia:
        env["XLA_FLAGS"] = with_flags(env.get("XLA_FLAGS", ""), XLA_FLAGS)
        for name, value in GPU_ENVIRONMENT.items():
            env.setdefault(name, value)
