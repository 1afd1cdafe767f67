import json
import math
import struct

import jax
import jax.numpy as jnp
import pytest
from tensorboardX.proto.event_pb2 import Event

from ldm_jax.config import UserError
from ldm_jax.training.metrics import Goodput, MetricWriter, Throughput, memory_in_use


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_are_written_one_step_late(tmp_path):
    first, second = jnp.float32(0.5), jnp.bfloat16(0.25)
    with MetricWriter(tmp_path) as writer, jax.transfer_guard("disallow"):
        writer.write(1, {"loss": first, "rate": 3})
        assert records(tmp_path) == []
        writer.write(2, {"loss": second})
        assert [(r["step"], r["loss"], r.get("rate")) for r in records(tmp_path)] == [(1, 0.5, 3.0)]
        writer.flush()
        writer.flush()
        assert [r["step"] for r in records(tmp_path)] == [1, 2]
    assert all(r["time"] > 1.6e9 for r in records(tmp_path))
    assert list(tmp_path.glob("events.out.tfevents.*"))


def events(path):
    """The events of a TensorBoard file: records of a length (8 bytes), its checksum (4), the event and its checksum (4)."""
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_not_finite_is_null_and_no_event(tmp_path):
    with MetricWriter(tmp_path, restored_step=4) as writer:
        writer.write(5, {"loss": math.nan, "norm": jnp.inf, "lr": 0.5, "a/b": 2})
    (record,) = records(tmp_path)
    assert record["loss"] is None and record["norm"] is None and record["lr"] == 0.5
    version, start, scalars = events(next(tmp_path.glob("events.out.tfevents.*")))
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == start.session_log.START  # what earlier files have from here on is forgotten
    assert scalars.step == 5 and scalars.wall_time == pytest.approx(record["time"], abs=1e-3)
    assert {value.tag: value.simple_value for value in scalars.summary.value} == {"lr": 0.5, "a/b": 2}


def test_a_disk_that_does_not_take_them_is_bad_input(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": 1})
    writer._file.close()
    writer._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(UserError, match=r"cannot write the metrics in .*: No space left on device"), writer:
        writer.write(2, {"loss": 2})


def test_file_is_cut_at_the_restored_step(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for n in range(6):
            writer.write(n, {"loss": n})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    with MetricWriter(tmp_path, restored_step=3) as writer:
        writer.write(4, {"loss": 40})
    after = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert after[:4] == before[:4]
    assert [(r["step"], r["loss"]) for r in records(tmp_path)][4:] == [(4, 40.0)]
    assert not list(tmp_path.glob("*.tmp"))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


def test_throughput_closed_form():
    clock = Clock()
    meter = Throughput(images_per_step=32, chips=4, peak=25e12, clock=clock)
    with meter.paused():
        clock.advance(7)  # compilation
    meter.begin()
    for _ in range(4):
        with meter.waiting():
            clock.advance(0.1)
        clock.advance(0.4)
        meter.step(5e12)
    with meter.paused():
        clock.advance(50)
    report = meter.report()
    speed = {"step_time": 0.5, "images_per_second": 64, "images_per_second_per_chip": 16, "data_wait": 0.2}
    work = {"tflops_per_second": 10, "tflops_per_second_per_chip": 2.5, "mfu": 0.1}
    assert report == pytest.approx(speed | work)
    assert meter.productive == pytest.approx(2)
    clock.advance(1)
    meter.step(1e12)
    assert meter.productive == pytest.approx(3)
    clock.advance(2)
    meter.step(2e12)  # of another program, of a bucket of larger pictures
    assert meter.report()["tflops_per_second"] == pytest.approx(1) and meter.productive == pytest.approx(5)
    assert set(Throughput(32, clock=clock).report()) == (speed | work).keys() - {"mfu"}


def test_goodput_counts_the_updates_that_stay_and_all_the_time(tmp_path):
    clock = Clock()
    first = Goodput(tmp_path, 0, clock(), clock)
    clock.advance(10)
    assert first.share(8) == pytest.approx(0.8)
    first.save(100, 8)
    clock.advance(10)
    assert first.share(17) == pytest.approx(
        17 / 20
    )  # killed: the 9 seconds behind the checkpoint are lost, and so are 20 until it starts again
    clock.advance(20)
    second = Goodput(tmp_path, 100, clock(), clock)
    assert second.share(0) == pytest.approx(8 / 40)
    clock.advance(10)
    second.save(200, 10)
    assert second.share(10) == pytest.approx(18 / 50)
    third = Goodput(tmp_path, 100, clock(), clock)  # the checkpoint of 200 was damaged
    assert third.share(0) == pytest.approx(8 / 50)
    third.save(150, 1)
    assert json.loads((tmp_path / "goodput.json").read_text()) == {"began": 100.0, "productive": {"0": 0.0, "100": 8.0, "150": 9.0}}


@pytest.mark.parametrize("content", ["", "[]", '{"began": 1}', '{"began": 1, "productive": {"x": 2}}'])
def test_goodput_begins_anew_where_its_file_is_damaged(tmp_path, caplog, content):
    (tmp_path / "goodput.json").write_text(content)
    clock = Clock()
    goodput = Goodput(tmp_path, 10, clock(), clock)
    clock.advance(4)
    assert goodput.share(1) == pytest.approx(0.25) and "goodput.json is damaged" in caplog.text


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"bytes_in_use": n * 2**30, "peak_bytes_in_use": 9 * 2**30}) for n in (1, 3)])
    assert memory_in_use() == {"hbm_gib": 3, "hbm_peak_gib": 9}
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    assert memory_in_use() == {}
