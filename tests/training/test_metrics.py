import json
import math

import jax
import jax.numpy as jnp
import pytest

from ldm_jax.training.metrics import MetricWriter, Throughput


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


def test_not_finite_is_null(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "norm": jnp.inf, "lr": 1e-3})
    (record,) = records(tmp_path)
    assert record["loss"] is None and record["norm"] is None and record["lr"] == 1e-3


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


def test_throughput_closed_form():
    now = 100.0

    def pass_time(seconds):
        nonlocal now
        now += seconds

    meter = Throughput(images_per_step=32, flops_per_step=5e12, peak=100e12, clock=lambda: now)
    for _ in range(4):
        with meter.waiting():
            pass_time(0.1)
        pass_time(0.4)
        meter.step()
    with meter.paused():
        pass_time(50)
    report = meter.report()
    expected = {"images_per_second": 64, "data_wait": 0.2, "tflops_per_second": 10, "mfu": 0.1}
    assert report == pytest.approx(expected)
    pass_time(1)
    meter.step()
    assert meter.report()["images_per_second"] == pytest.approx(32)
    assert set(Throughput(32, clock=lambda: now).report()) == {"images_per_second", "data_wait"}
