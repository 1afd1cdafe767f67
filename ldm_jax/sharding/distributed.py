"""Process set-up for runs on several hosts."""

import os
import re
import socket

import jax

from ldm_jax.errors import NotJoined, UserError
from ldm_jax.sharding import watch

TIMEOUT = 300  # seconds that processes wait for one another at the start

Explicit = tuple[str | None, int | None, int | None]  # coordinator, how many processes, which one


def cluster_environment() -> str | None:
    """The cluster that started this process as one of several, by its environment variables; None on a single host."""
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        return "JAX_COORDINATOR_ADDRESS"
    if "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES", ""))
    if "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        return "Cloud TPU"
    return None


def from_variables() -> Explicit:
    """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; in a Kubernetes Job of completion mode "Indexed" the last
    is JOB_COMPLETION_INDEX where it is not given. Raises UserError for what is no number."""
    env = os.environ
    try:
        number, which = (int(text) if text else None for text in (env.get("JAX_NUM_PROCESSES"), _process_id()))
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX) must be whole numbers: {error}") from error
    return env.get("JAX_COORDINATOR_ADDRESS"), number, which


def _process_id() -> str | None:
    return os.environ.get("JAX_PROCESS_ID", os.environ.get("JOB_COMPLETION_INDEX"))


def own_gpus() -> list[int] | None:
    """The GPUs of a process that Slurm has started alone on its node: all that it was given. None: jax takes one each."""
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    if "SLURM_PROCID" in os.environ and re.fullmatch(r"1(\(x\d+\))?", tasks) and "SLURM_GPUS_ON_NODE" in os.environ:
        return list(range(int(os.environ["SLURM_GPUS_ON_NODE"])))
    return None


def port_of(address: str) -> int:
    """That of "host:port". Raises UserError."""
    port = address.rpartition(":")[2]
    if not (":" in address and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"coordinator={address}: give the address of process 0 as HOST:PORT")
    return int(port)


def check_free(port: int) -> None:
    """Raises UserError where process 0 cannot listen at a port, or another program does: gRPC would share it, and processes of two runs
    would meet there, which jax ends with an abort."""
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"process 0 cannot listen at port {port} for the others: {reason}; give a port that is free") from error


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> bool:
    """Joins the processes of a run into one; to be called before anything touches a device.

    With the three arguments ("host:port", how many, which one), or `coordinator="auto"` (jax asks the environment: needed on a
    Cloud TPU slice without GKE), or where the environment shows a cluster. Otherwise nothing happens.

    Processes that do not come within `TIMEOUT` seconds end this one with exit code 1.

    Returns:
        Whether the run is distributed.

    Raises:
        UserError: the processes are wrongly described, or the port of process 0 is not free.
        NotJoined: it failed. A process never goes on alone, as N runs of one process would overwrite each other.
    """
    asked = [value for value in (coordinator, num_processes, process_id) if value is not None]
    auto = coordinator == "auto" and len(asked) == 1
    if asked and not auto and len(asked) < 3:
        raise UserError(
            f"coordinator={coordinator}, num_processes={num_processes}, process_id={process_id}: give all three, or coordinator='auto'"
        )
    cluster = cluster_environment()
    if not asked and cluster is None:
        return False
    found = "the arguments given" if asked else f"the environment ({cluster})"
    given = (coordinator, num_processes, process_id) if len(asked) == 3 else from_variables()
    if None in given:
        given = (None, None, None)  # jax knows the cluster
    elif given[0] is not None:
        port = port_of(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", given[0]))
        if given[2] == 0:
            check_free(port)
    jax.config.update("jax_enable_preemption_service", False)  # its handler of SIGTERM would take the place of ours
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    watch.on_abort(lambda: f"error: joining the other processes by {found} failed, as jax says above (waiting ends after {TIMEOUT} s)")
    try:
        jax.distributed.initialize(
            *given, local_device_ids=own_gpus(), initialization_timeout=TIMEOUT, heartbeat_timeout_seconds=watch.HEARTBEAT
        )
    except (RuntimeError, OSError) as error:
        raise NotJoined(f"joining the other processes by {found} failed: {error}") from error
    except ValueError as error:
        raise UserError(f"joining the other processes by {found} failed: {error}") from error
    watch.on_abort(watch.abort_line)
    if num_processes is not None and jax.process_count() != num_processes:
        raise UserError(f"{num_processes} processes were asked for, but jax sees {jax.process_count()}")
    return True
