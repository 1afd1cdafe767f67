import os
import signal
import threading
from contextlib import nullcontext

import pytest

from ldm_jax.training.signals import SIGNALS, Stopped, StopSignals, stopping_at_once


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_handlers_are_put_back(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_second_interrupt_interrupts():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_the_loop_a_signal_stops_at_once(number):
    """Around the loop, which notes it and goes on to the end of its update."""
    with pytest.raises(Stopped, match="goes on from there"), stopping_at_once():
        with StopSignals() as stop:
            os.kill(os.getpid(), number)
            assert stop.stops_before(3)
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("error", [None, Stopped, ValueError])
def test_handlers_are_put_back_but_a_stopped_process_ends_in_peace(error):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(error) if error else nullcontext(), stopping_at_once():
        if error:
            raise error
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert after == ([signal.SIG_IGN, before[1]] if error is Stopped else before)


def test_inert_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) == before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, True)]
