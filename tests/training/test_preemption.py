"""Against a metadata server like that of Google's machines, which holds a question back until there is something new."""

import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ldm_jax.errors import Stopped
from ldm_jax.training import preemption
from ldm_jax.training.preemption import metadata_server, noticed
from ldm_jax.training.signals import SIGNALS, stopping_at_once
from tests.test_processes import signalled

LIMIT = 60.0  # seconds for what takes a moment
TERMINATE = "TERMINATE_ON_HOST_MAINTENANCE"


class Machine:
    """What the server says of it, and how it was asked."""

    def __init__(self) -> None:
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.asked: list[str] = []
        self.fails: list[int] = []  # codes of the next answers
        self.changed = threading.Condition()

    def set(self, name: str, value: str) -> None:
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()

    def until_asked(self, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= times, LIMIT)

    def answer(self, name: str, query: dict[str, list[str]], flavor: str | None) -> tuple[int, str]:
        with self.changed:
            self.asked.append(name)
            self.changed.notify_all()
            if self.fails:
                return self.fails.pop(), "no"
            if flavor != "Google" or query["wait_for_change"] != ["true"]:
                return 403, "no"
            if name not in self.values:
                return 404, "no"
            self.changed.wait_for(lambda: query["last_etag"] != [self.etag(name)], min(float(query["timeout_sec"][0]), LIMIT))
            return 200, self.values[name]

    def etag(self, name: str) -> str:
        return self.values[name].lower()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    known = Machine()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            name = url.path.removeprefix("/computeMetadata/v1/instance/")
            code, text = known.answer(name, parse_qs(url.query), self.headers["Metadata-Flavor"])
            self.send_response(code)
            if code == 200:
                self.send_header("ETag", known.etag(name))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    monkeypatch.setenv("http_proxy", "http://localhost:9")
    monkeypatch.setattr(preemption, "_PAUSE", 0.1)
    yield known
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def heard() -> Iterator[list[int]]:
    """The signals that have come, where nothing else takes them."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in SIGNALS}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def until(seen: list[int]) -> None:
    end = time.monotonic() + LIMIT
    while not seen:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("name", "value"), [("preempted", "TRUE"), ("maintenance-event", TERMINATE)])
def test_a_notice_is_a_sigterm(machine: Machine, heard: list[int], name: str, value: str) -> None:
    with noticed():
        machine.until_asked(4)  # each twice: once for what is so, once for what changes
        assert not heard
        machine.set(name, value)
        until(heard)
        machine.until_asked(5)
    assert heard == [signal.SIGTERM]


def test_a_job_stops(machine: Machine) -> None:
    with pytest.raises(Stopped), stopping_at_once():
        machine.until_asked(4)
        machine.set("preempted", "TRUE")
        time.sleep(LIMIT)


@pytest.mark.slow
def test_the_processes_of_a_run_stop_together(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("http_proxy")  # gRPC would go there
    job = signalled(tmp_path, "turns", "turns")
    machine.until_asked(8)
    machine.set("preempted", "TRUE")
    assert job.codes() == [75, 75], [log.read_text()[-3000:] for log in job.logs]
    said = {job.last_line(which) for which in (0, 1)}
    assert len(said) == 1 and said.pop().startswith("stopped before turn ")


def test_what_is_no_news_or_moves_a_machine_elsewhere_alone_is_not_heard(machine: Machine, heard: list[int]) -> None:
    """As on a machine on which the job is started again after the notice."""
    machine.values = {"preempted": "TRUE", "maintenance-event": "NONE"}
    with noticed():
        machine.until_asked(4)
        machine.set("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")
        machine.until_asked(5)
        assert not heard
        machine.set("maintenance-event", "NONE")
        machine.until_asked(6)
        machine.set("maintenance-event", TERMINATE)
        until(heard)


def test_a_server_that_answers_without_news_is_asked_again(machine: Machine, heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_HELD", 1)
    machine.values["maintenance-event"] = TERMINATE
    with noticed():
        machine.until_asked(6)
        assert not heard
        machine.set("preempted", "TRUE")
        until(heard)


def test_a_server_that_fails_is_asked_again(machine: Machine, heard: list[int]) -> None:
    machine.fails = [503, 500, 503, 429]
    with noticed():
        machine.until_asked(8)
        machine.set("preempted", "TRUE")
        until(heard)


def test_a_server_that_does_not_know_is_left_alone(machine: Machine, heard: list[int]) -> None:
    machine.values.clear()
    with noticed():
        machine.until_asked(2)
        time.sleep(0.5)
    assert sorted(machine.asked) == ["maintenance-event", "preempted"] and not heard


def test_after_the_job_nothing_is_sent(machine: Machine, heard: list[int]) -> None:
    with noticed():
        machine.until_asked(4)
    machine.set("preempted", "TRUE")
    time.sleep(0.5)
    assert not heard


@pytest.mark.parametrize(
    ("product", "server"), [("Google Compute Engine\n", "metadata.google.internal"), ("Standard PC (Q35)\n", None), (None, None)]
)
def test_which_machines_are_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, product: str | None, server: str | None) -> None:
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(preemption, "_PRODUCT", tmp_path / "product_name")
    if product is not None:
        (tmp_path / "product_name").write_text(product)
    assert metadata_server() == server
    monkeypatch.setenv("GCE_METADATA_HOST", "metadata:8080")
    assert metadata_server() == "metadata:8080"
