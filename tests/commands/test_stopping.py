"""Requests to stop in the last moments of a process change neither its code nor its last line."""

import os
import signal
import subprocess
import sys

import forks
import pytest
import runs

from gpt_jax.commands import compiling

LAST = """
import atexit, os, signal, sys, time
from gpt_jax.commands import main
from gpt_jax.errors import {error}

def run(arguments):
    if {raises}:
        raise {error}("the reason")

@atexit.register
def end():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.01)

main.run = run
main.main([])
"""


@pytest.mark.parametrize("error, raises, code", [("Stopped", True, 10), ("Stopped", False, 0)])
def test_a_signal_at_the_very_end_changes_nothing(error, raises, code):
    """JAX cleans up where this one gets its signals."""
    ended = forks.run([sys.executable, "-c", LAST.format(error=error, raises=raises)])
    assert (ended.returncode, ended.stderr) == (code, "gpt-jax: the reason\n" if raises else "")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_prepare_stops_at_the_first_request_and_takes_no_second(tmp_path, monkeypatch, first):
    runs.write_text(tmp_path / "text.txt")
    has_ended_workers = []

    def prepare_corpus(*_):
        try:
            os.kill(os.getpid(), first)
            pytest.fail("the request did not come")
        finally:  # The workers are ended here.
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
            has_ended_workers.append(True)

    monkeypatch.setattr("gpt_jax.data.prepare_corpus", prepare_corpus)
    given = ["prepare", "--input", tmp_path / "text.txt", "--output", tmp_path / "out"]
    with runs.own_signals():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code, text = runs.refusal(*given)
    assert code == 10 and "the same command goes on from there" in text
    assert has_ended_workers


def test_prepare_in_the_background_ignores_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "gpt_jax.data.prepare_corpus", lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )
    monkeypatch.setattr("gpt_jax.data.summarize_corpus", lambda folder: ["done"])
    with runs.own_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        runs.call("prepare", "--input", runs.TINY, "--output", tmp_path / "out")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


LEAVE_TWICE = """
import os, signal, time
from gpt_jax.commands import runtime
leave = runtime.leaving("stopped")
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, leave)
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(9)
finally:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
"""


def test_a_second_request_before_the_first_step_changes_nothing():
    ended = forks.run([sys.executable, "-c", LEAVE_TWICE])
    assert (ended.returncode, ended.stderr) == (10, "gpt-jax: stopped\n")


def test_a_request_while_a_child_starts_ends_the_child(monkeypatch):
    """It comes when the child is there, and `Popen` has not returned yet."""
    children = []
    plain = subprocess.Popen

    def start(command, **given):
        children.append(plain(command, **given))
        os.kill(os.getpid(), signal.SIGTERM)
        return children[0]

    def leave(*_):
        sys.exit(10)

    monkeypatch.setattr(compiling.subprocess, "Popen", start)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit):
            compiling.run_child(["sleep", "600"], os.environ)
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children[0].poll() == -signal.SIGKILL
