"""What signals do to a run."""

import signal

import pytest

from hpr_jax.training.stopping import EXIT_CODES, StopRequests


@pytest.fixture(autouse=True)
def usual_handlers():
    """Tests that are a background job of a shell find some of the signals ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_noted_and_told(number, code):
    with StopRequests() as requests:
        assert requests.noted is None
        signal.raise_signal(number)
        assert requests.noted is number
    error = requests.stop(7)
    assert error.exit_code == code
    assert str(error) == f"Stopped by {number.name}; step 7 is saved, and the same command goes on from it."


def test_a_second_interrupt_ends_the_step_at_once():
    with StopRequests() as requests:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        # A scheduler repeats itself; that is no reason to lose the step.
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert requests.noted is signal.SIGTERM


def test_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            signal.raise_signal(signal.SIGHUP)
            assert requests.noted is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_process_was_asked():
    assert StopRequests().stop(3).exit_code == 75


def test_afterwards_signals_do_what_they_did_before():
    before = [signal.getsignal(number) for number in EXIT_CODES]
    with StopRequests():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in EXIT_CODES] == before
