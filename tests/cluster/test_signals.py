"""What a run does when somebody asks it to stop."""

import os
import signal

import pytest

from gpt_jax.cluster import StopRequest


@pytest.fixture
def interrupts():
    """Ctrl-C as in a terminal, also if the tests themselves run in the background."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


def test_ctrl_c_is_a_request_and_the_second_one_ends_at_once(interrupts, capsys):
    stop = StopRequest()
    try:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() and stop()
        assert capsys.readouterr().err.count("Ctrl-C: stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        stop.close()


def test_ctrl_c_is_ignored_where_the_shell_has_ignored_it(interrupts):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        stop.close()
