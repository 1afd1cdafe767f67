import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from ldm_jax import cli
from ldm_jax.errors import NotJoined, UserError
from ldm_jax.sharding import watch
from ldm_jax.sharding.distributed import check_free, cluster_environment, initialize, own_gpus

ROOT = Path(__file__).parents[2]

MARKERS = ("JAX_COORDINATOR_ADDRESS", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")
MARKERS += ("TPU_PROCESS_ADDRESSES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX", "SLURM_GPUS_ON_NODE")


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
        ({"TPU_PROCESS_ADDRESSES": "t0:8471,t1:8471"}, "Cloud TPU"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "t0"}, "Cloud TPU"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_cluster_environment(monkeypatch, env, cluster):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cluster_environment() == cluster


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "h:1"}
JOB = ADDRESS | {"JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}


@pytest.mark.parametrize(
    ("env", "found"),
    [(JOB, ("h:1", 4, 2)), (JOB | {"JAX_PROCESS_ID": "3"}, ("h:1", 4, 3)), (ADDRESS, (None, None, None))],
)
def test_variables_say_who_joins_whom(monkeypatch, env, found):
    """Where they do not say all, jax asks the cluster for the rest."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: joined.append(args))
    monkeypatch.setattr(watch, "on_abort", lambda line: None)  # of a test, an abort is an abort
    assert initialize() and joined == [found]


def test_variables_that_are_no_numbers(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "h:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "all")
    with pytest.raises(UserError, match="whole numbers"):
        initialize()


@pytest.mark.parametrize(("tasks", "gpus"), [("1", [0, 1, 2, 3]), ("1(x8)", [0, 1, 2, 3]), ("4(x8)", None), ("11", None)])
def test_a_task_that_is_alone_on_its_node_has_all_its_gpus(monkeypatch, tasks, gpus):
    assert own_gpus() is None
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_GPUS_ON_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert own_gpus() == gpus


def test_single_host_touches_nothing(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a: pytest.fail("called"))
    assert initialize() is False


def test_incomplete_arguments():
    with pytest.raises(UserError, match="give all three"):
        initialize("host:1234", 2)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("connection refused"), NotJoined),
        (ConnectionError("connection refused"), NotJoined),
        (type("JSONDecodeError", (OSError, ValueError), {})("connection refused"), NotJoined),
        (ValueError("connection refused"), UserError),
    ],
)
def test_failure_is_raised_with_its_reason(monkeypatch, error, raised):
    """What may pass is no bad input, which is never started again."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setattr(watch, "on_abort", lambda line: None)
    with pytest.raises(raised, match="arguments given failed: connection refused"):
        initialize("localhost:1", 2, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(raised, match=r"environment \(Open MPI\) failed: connection refused"):
        initialize()


def test_processes_that_do_not_meet_are_a_fault(capsys):
    def main():
        raise NotJoined("nobody there")

    with pytest.raises(SystemExit, match="1"):
        cli.guarded(main)
    assert capsys.readouterr().err == "error: nobody there\n"


@pytest.mark.parametrize("address", ["host", "host:", "host:port", "host:0", "host:65536", "12321"])
def test_an_address_without_a_port(address):
    with pytest.raises(UserError, match="HOST:PORT"):
        initialize(address, 2, 1)


@pytest.mark.parametrize(
    "options",
    [(socket.SO_REUSEADDR,), (socket.SO_REUSEADDR, socket.SO_REUSEPORT)],  # the latter as gRPC listens
)
@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::")])
def test_a_port_at_which_another_program_listens(options, family, host):
    with socket.socket(family) as other:
        for option in options:
            other.setsockopt(socket.SOL_SOCKET, option, 1)
        other.bind((host, 0))
        port = other.getsockname()[1]
        other.listen()
        with pytest.raises(UserError, match=f"cannot listen at port {port} for the others: Address already in use"):
            initialize(f"localhost:{port}", 2, 0)
    check_free(port)


def test_a_port_is_free_again_as_soon_as_its_job_has_ended():
    """Where the connections of before still wait to be forgotten."""
    server = socket.create_server(("localhost", 0))
    port = server.getsockname()[1]
    with socket.create_connection(("localhost", port)), server.accept()[0] as accepted:
        accepted.close()  # the first to close is the one that waits
        server.close()
        check_free(port)
    check_free(port)


def test_a_job_leaves_another_at_its_port_alone():
    """Process 0 of the other one ends with one line."""
    with socket.create_server(("", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "tests.worker", f"localhost:{port}", "2", "0", "signals", "-", "outside", "outside"]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert (
        done.stderr == f"error: process 0 cannot listen at port {port} for the others: Address already in use; give a port that is free\n"
    )


WORKER = """
import os, sys
os.environ["JAX_PLATFORMS"], os.environ["XLA_FLAGS"] = "cpu", "--xla_force_host_platform_device_count=2"
import jax, numpy as np
from ldm_jax.config import UserError
from ldm_jax.sharding import distributed, processes, watch
from ldm_jax.sharding.mesh import local_rows, make_mesh, on_host, to_global
rank = int(sys.argv[2])
assert distributed.initialize("localhost:" + sys.argv[1], 2, rank)
watch.start()
sys.stdout = open(sys.argv[3], "w")  # apart from what Gloo's threads print, in pieces
devices = np.array(jax.devices())
for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
    mesh = make_mesh(2, 2, devices[order])
    rows = local_rows(8, mesh)
    assert len(rows) == 4
    batch = to_global({"x": np.arange(8.0)[rows]}, mesh)["x"]
    print(batch.shape, float(jax.jit(lambda x: (x * np.arange(8.0)).sum())(batch)), on_host([batch, np.ones(1)])[0].tolist())
print(rows.tolist())
print(processes.exchange({"from": rank}), processes.from_first(lambda: f"of {rank}"))
try:
    processes.from_first(lambda: (_ for _ in ()).throw(UserError(f"bad input, says {rank}")))
except UserError as error:
    print(error)
watch.current().leave(0)
"""


def test_two_processes_make_one_batch_and_say_the_same(tmp_path):
    """Whichever rows of it lie on their devices."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", WORKER, port]
    workers = [subprocess.Popen([*command, str(i), tmp_path / str(i)]) for i in range(2)]
    try:
        assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    batch = "(8,) 140.0 [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]"
    said = ["[{'from': 0}, {'from': 1}] of 0", "bad input, says 0"]
    for i, rows in enumerate(("[2, 3, 6, 7]", "[0, 1, 4, 5]")):
        assert (tmp_path / str(i)).read_text().splitlines() == [batch, batch, rows, *said]


ALONE = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
from ldm_jax.sharding import distributed
distributed.TIMEOUT = 5
distributed.initialize("localhost:" + sys.argv[1], 2, 0)
"""


@pytest.mark.slow
def test_waiting_for_a_process_that_does_not_come_ends():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run([sys.executable, "-c", ALONE, port], stderr=subprocess.PIPE, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: joining the other processes by the arguments given failed")
