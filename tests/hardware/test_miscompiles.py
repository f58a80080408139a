"""Known faults of compilers: right programs pass, each fault is seen, and a run stops at it."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jaxlib
import pytest
import runs

from gpt_jax.commands import evaluate, generate
from gpt_jax.errors import EXIT_CODES, Exit, Miscompiled
from gpt_jax.hardware import miscompiles
from gpt_jax.hardware.miscompiles import MISCOMPILES, Machine, Miscompile, check_miscompiles
from gpt_jax.run import build

ROOT = Path(__file__).resolve().parents[2]
HERE = Machine(jax.devices()[0], jaxlib.__version__)


def make_card(jaxlib: str, capability: str) -> Machine:
    return Machine(SimpleNamespace(platform="gpu", compute_capability=capability), jaxlib)


def make_fault(seen: list[str], say: str = "1 for 2") -> Miscompile:
    """A row that counts its looks."""

    def look(machine):
        seen.append(str(machine.device))
        return say

    return Miscompile(("1",), ("cpu",), "", "Sums are wrong.", look, "take another")


def test_programs_are_right_here():
    """Those for GPUs run here too, although a run on a CPU leaves them out."""
    assert [fault.reports for fault in MISCOMPILES if fault.look(HERE)] == []


def test_programs_run_on_the_device_that_is_asked_for(monkeypatch, mesh):
    places = []

    def look(machine):
        places.append((jnp.ones(2) + 1).devices())
        places.append(jax.jit(jnp.negative)(1.0).devices())
        return ""

    row = make_fault([])._replace(look=look)
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (row,))
    third = jax.devices()[3]
    with jax.set_mesh(mesh(2, 2)):
        assert miscompiles.find_miscompiles(HERE._replace(device=third)) == []
    assert places == [{third}] * 2


def test_softmax_of_very_large_scores_is_still_nan_on_a_cpu(monkeypatch):
    """So the program can see the fault. When the compiler is mended, this test fails."""
    monkeypatch.setattr(miscompiles, "LARGE_SCORE", 2.0**40)
    assert "nan" in miscompiles.look_at_softmax(HERE)


def test_wrong_operators_are_seen(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(jnp, "sqrt", lambda x: 0 * x)
        assert miscompiles.look_at_operators(HERE) == "sqrt(512) = 0.0"
    monkeypatch.setattr(jnp, "ones", lambda *_: jnp.full(4, 512.0))
    assert miscompiles.look_at_operators(HERE) == "ones(4) + 1 = [513.0, 513.0, 513.0, 513.0]"


def test_cards_are_known_by_version_and_kind():
    look = miscompiles.look_for_triton_fusion
    assert "0.11.0 on compute capability 12.0" in look(make_card("0.11.0", "12.0"))
    assert look(make_card("0.12.0.1", "12.0")) == look(make_card("0.11.0", "9.0")) == ""


@pytest.mark.skipif(jaxlib.__version__ != "0.10.2", reason="the faults are those of jaxlib 0.10.2")
def test_devices_opened_before_the_import_are_noticed(tmp_path):
    """They are noticed although the same environment passed before."""
    assert check_miscompiles(HERE.device, False, str(tmp_path)) == []

    late = (
        "import jax; jax.devices(); from gpt_jax.hardware import check_miscompiles\n"
        f"check_miscompiles(jax.devices()[0], False, {str(tmp_path)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", late],
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    line = done.stderr.splitlines()[-1]
    assert "jax#39103" in line and "jax#39257 and jax#40412" in line
    assert "for 1,073,741,824.0" in line and "import gpt_jax before the first array" in line


def test_what_passed_is_remembered_and_what_failed_is_not(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (make_fault(seen, ""),))
    folder = tmp_path / "new" / "folder"
    for _ in range(2):
        assert check_miscompiles(HERE.device, False, str(folder)) == []
    assert len(seen) == 1 and len(list(folder.iterdir())) == 1

    # A home that cannot be written makes no difference.
    (tmp_path / "file").touch()
    for _ in range(2):
        assert check_miscompiles(HERE.device, False, str(tmp_path / "file")) == []
    assert len(seen) == 3

    broken = make_fault(seen)._replace(reports=("2",))
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (broken,))
    for _ in range(2):
        with pytest.raises(Miscompiled, match=r"jax#2: Sums are wrong\. Seen: 1 for 2\. take"):
            check_miscompiles(HERE.device, False, str(folder))
    assert len(seen) == 5 and len(list(folder.iterdir())) == 1


def test_a_second_start_compiles_nothing(tmp_path):
    """Where gpt_jax is imported first, as the commands do."""
    program = f"""
import gpt_jax, jax
from gpt_jax.hardware import check_miscompiles
compiled = []
def listen(event, seconds, **_):
    compiled.append(event) if "backend_compile" in event else None
jax.monitoring.register_event_duration_secs_listener(listen)
for _ in range(2):
    jax.clear_caches()
    check_miscompiles(jax.devices()[0], False, {str(tmp_path)!r})
    print(len(compiled))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    first, second = map(int, done.stdout.split())
    assert 0 < first == second


def test_another_platform_is_not_looked_at(monkeypatch, tmp_path):
    row = make_fault([])._replace(platforms=("gpu", "tpu"))
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (row,))
    assert check_miscompiles(HERE.device, False, str(tmp_path)) == []


def test_a_run_stops_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (make_fault([]),))
    mesh = "--config.mesh.data=8"
    with pytest.raises(Miscompiled, match=r"config\.compute\.ignore_miscompiles = true"):
        build(runs.load(tmp_path, mesh), [].append)

    lines = []
    config = runs.load(tmp_path, mesh, "--config.compute.ignore_miscompiles=true")
    build(config, lines.append)
    assert [line for line in lines if "jax#1: Sums are wrong." in line] == [
        "ignored, as config.compute.ignore_miscompiles says: jax#1: Sums are wrong. Seen: 1 for 2. "
        "take another"
    ]
    assert Miscompiled.code == 32 and 32 in EXIT_CODES


@pytest.mark.parametrize("command, more", [(evaluate, []), (generate, ["--prompt=a"])])
def test_a_checkpoint_is_not_used_unless_told_otherwise(tmp_path, monkeypatch, command, more):
    monkeypatch.setattr(miscompiles, "MISCOMPILES", (make_fault([]),))
    monkeypatch.setattr(command, "start_runtime", lambda args: None)
    monkeypatch.setattr(command, "end_on_request", lambda: None)
    flags = [f"--checkpoint={tmp_path}", *more]
    with pytest.raises(Miscompiled):
        command.main(flags)
    with pytest.raises(Exit) as ended:  # there is no checkpoint
        command.main([*flags, "--ignore_miscompiles"])
    assert not isinstance(ended.value, Miscompiled)


def test_the_page_is_made_from_the_table():
    """Make it anew by `python -m gpt_jax.hardware.miscompiles >docs/miscompiles.md`."""
    assert (ROOT / "docs/miscompiles.md").read_text() == miscompiles.make_page()
