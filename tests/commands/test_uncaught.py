"""What threads of libraries do not catch does not hide the line that says what has happened."""

import sys

import forks

SCRIPT = """
import sys, threading
from gpt_jax import errors
from gpt_jax.commands import main

def fail():
    raise RuntimeError("Event loop\\nis closed")

class Failing:
    def __del__(self):  # its error goes the way of errors in threads of native code
        fail()

def fail_as_native_code_does():
    Failing()

def leave():
    raise SystemExit(3)

def run(arguments):
    targets = [fail, fail_as_native_code_does] * 20 + [leave]
    targets.append(lambda: errors.restart_seconds(None))  # a bug of our own
    for target in targets:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    raise errors.SaveFailed("the disk is full")

main.run = run
main.main([])
"""


def test_each_kind_is_told_once_and_our_own_errors_whole():
    ended = forks.run([sys.executable, "-c", SCRIPT])
    first, *rest, last = ended.stderr.splitlines()
    assert ended.returncode == 50 and last == "gpt-jax: the disk is full"
    assert first == (
        "gpt-jax: a thread of a library ended with RuntimeError: Event loop is closed "
        "(<string>:7); more of these are not printed"
    )
    assert sum("Traceback" in line for line in rest) == 1
    assert "restart_seconds" in ended.stderr and "TypeError" in ended.stderr
