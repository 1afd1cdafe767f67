"""Process set-up for runs on several hosts."""

import os

import jax

from ldm_jax.config import UserError


def cluster_environment() -> str | None:
    """The cluster that started this process as one of several, by its environment variables; None on a single host."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        return "JAX_COORDINATOR_ADDRESS"
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    if "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "Cloud TPU"
    return None


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Joins the processes of a run into one; to be called before anything touches a device.

    With the three arguments ("host:port", how many, which one), or `coordinator="auto"` (jax asks the environment: needed on a
    Cloud TPU slice without GKE), or where the environment shows a cluster. Otherwise nothing happens.

    Returns:
        Whether the run is distributed.

    Raises:
        UserError: joining failed. A process never goes on alone, as N runs of one process would overwrite each other.
    """
    explicit = (coordinator, num_processes, process_id)
    asked = [value for value in explicit if value is not None]
    auto = coordinator == "auto" and len(asked) == 1
    if asked and not auto and len(asked) < 3:
        raise UserError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: give all three, or coordinator='auto'"
        )
    cluster = cluster_environment()
    if not asked and cluster is None:
        return False
    try:
        if asked and not auto:
            jax.distributed.initialize(coordinator, num_processes, process_id)
        else:
            jax.distributed.initialize()
    except (RuntimeError, ValueError, OSError) as error:
        found = "the arguments given" if asked else f"the environment ({cluster})"
        raise UserError(f"joining the other processes by {found} failed: {error}") from error
    if num_processes is not None and jax.process_count() != num_processes:
        raise UserError(f"{num_processes} processes were asked for, but jax sees {jax.process_count()}")
    return True
