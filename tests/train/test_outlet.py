"""A step that is being sent: the watchdog hears of it as long as something is sent."""

import concurrent.futures

from gpt_jax.train.checkpoint import outlet


class Sending(outlet.Outlet):
    """Gives the numbers of `progress` one after another, and ends with the last."""

    is_away = True

    def __init__(self, progress, sealed):
        self.left = list(progress)
        self.sealed = sealed

    def progress(self):
        if len(self.left) > 1:
            return self.left.pop(0)
        if not self.sealed.done():
            self.sealed.set_result(None)
        return self.left[0]


def beats(progress, monkeypatch) -> int:
    """How often the watchdog is told."""
    monkeypatch.setattr(outlet, "SENDING_SECONDS", 0.001)
    told = []
    sealed = concurrent.futures.Future()
    outlet.wait_for(sealed, Sending(progress, sealed), lambda: told.append(1))
    return len(told)


def test_the_watchdog_hears_of_progress_alone(monkeypatch):
    assert beats([0, 1, 2, 3, 3], monkeypatch) == 4
    assert beats([0, 0, 0, 0, 0], monkeypatch) == 1


def test_nothing_is_waited_for_on_a_disk():
    outlet.wait_for(concurrent.futures.Future(), outlet.NOWHERE, lambda: None)
