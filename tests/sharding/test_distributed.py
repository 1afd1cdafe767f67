import socket
import subprocess
import sys

import jax
import pytest

from ldm_jax.config import UserError
from ldm_jax.sharding.distributed import cluster_environment, initialize

MARKERS = ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


@pytest.fixture(autouse=True)
def single_host(monkeypatch):
    for name in MARKERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("env", "cluster"),
    [
        ({}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, "Cloud TPU"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_cluster_environment(monkeypatch, env, cluster):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cluster_environment() == cluster


def test_single_host_touches_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: pytest.fail("called"))
    assert initialize() is False


def test_incomplete_arguments():
    with pytest.raises(UserError, match="give all three"):
        initialize("host:1234", 2)


def test_failure_is_raised_with_its_reason(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError, match="arguments given failed: connection refused"):
        initialize("localhost:1", 2, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"environment \(Open MPI\) failed: connection refused"):
        initialize()


WORKER = """
import os, sys
os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from ldm_jax.sharding.distributed import initialize
from ldm_jax.sharding.mesh import make_mesh, to_global
rank = int(sys.argv[2])
assert initialize("localhost:" + sys.argv[1], 2, rank)
mesh = make_mesh(2, 2)
batch = to_global({"x": np.arange(4.0) + 4 * rank}, mesh)["x"]
print(batch.shape, float(jax.jit(lambda x: (x * x).sum())(batch)))
"""


def test_two_processes_make_one_batch():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", WORKER, port]
    workers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(2)]
    try:
        outputs = [worker.communicate(timeout=60)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [output.splitlines()[-1] for output in outputs] == ["(8,) 140.0"] * 2
