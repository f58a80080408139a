"""The garbage collector works at steps of a run, and as before after it."""

import gc

import pytest

from gpt_jax.run import collector


class Cycle:
    """An object that only the collector can take away."""

    alive = 0

    def __init__(self):
        self.own = self
        Cycle.alive += 1

    def __del__(self):
        Cycle.alive -= 1


def test_it_collects_at_its_steps_alone(monkeypatch):
    monkeypatch.setattr(collector, "EVERY_STEPS", 4)
    with collector.collecting_by_step() as collect:
        assert not gc.isenabled()
        for step in range(1, 9):
            Cycle()
            collect(step)
            assert Cycle.alive == step % 4
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_it_is_as_before_after_a_failure():
    with pytest.raises(ZeroDivisionError), collector.collecting_by_step():
        raise ZeroDivisionError
    assert gc.isenabled()
