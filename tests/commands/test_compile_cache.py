"""Compiled programs that are kept for the next start."""

import os

import jax
import jax.numpy as jnp
import pytest
import runs
from jax.experimental.compilation_cache import compilation_cache

from gpt_jax.commands import compile_cache
from gpt_jax.errors import UsageError

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)
EVERYTHING = {compile_cache.SHORTEST_VARIABLE: "0"}


@pytest.fixture
def own_settings():
    """Lets a test give JAX another folder, and gives JAX its settings back."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def find_folder(home):
    return home / ".cache/gpt_jax/compiled" / compile_cache.machine_digest({})


def test_the_folder_is_made_and_said_once(own_settings, home, capfd):
    for _ in range(2):
        compile_cache.keep_compiled(None, {})
    folder = find_folder(home)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.SHORTEST_SECONDS
    assert folder.stat().st_mode & 0o777 == 0o700  # whoever writes there has code run
    (line,) = capfd.readouterr().err.splitlines()
    assert str(folder) in line and "--compilation_cache=none" in line


def test_what_jax_was_told_stays(own_settings, home):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 7.0)
    compile_cache.keep_compiled(None, {compile_cache.FOLDER_VARIABLE: "elsewhere"} | EVERYTHING)
    assert jax.config.jax_compilation_cache_dir == before
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 7.0
    assert not find_folder(home).exists()


def test_none_keeps_nothing(own_settings, home):
    compile_cache.keep_compiled("none", {})
    assert not jax.config.jax_enable_compilation_cache and not find_folder(home).exists()


def test_a_folder_that_cannot_be_used(own_settings, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"^--compilation_cache=.*file.* cannot be used"):
        compile_cache.keep_compiled(str(tmp_path / "file"), {})

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    compile_cache.keep_compiled(None, {})
    assert jax.config.jax_compilation_cache_dir == before  # and the command goes on
    assert "programs are compiled at every start" in capfd.readouterr().err


def count_hits(function, argument):
    """(value, number of programs that were loaded), in a process that has compiled nothing."""
    hits = []

    def note(event, **_):
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_listener(note)
    try:
        return float(jax.jit(function)(argument)), len(hits)
    finally:
        jax.monitoring.unregister_event_listener(note)


def test_programs_are_loaded_and_damaged_ones_made_anew(own_settings, tmp_path):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compile_cache.keep_compiled(str(tmp_path), EVERYTHING)

    def function(x):
        return (jnp.sin(x) * 3.25).sum()

    x = jnp.arange(7.0)
    first, hits = count_hits(function, x)
    assert hits == 0
    assert count_hits(function, x) == (first, 1)

    for path in tmp_path.rglob("*-cache"):  # a kill in the middle of writing
        path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert count_hits(function, x) == (first, 0)


def test_the_oldest_programs_go_first(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / name
        path.write_bytes(b"x" * 10)
        os.utime(path, (1000 - age, 1000 - age))
    compile_cache.drop_oldest(tmp_path, 40)
    assert len(list(tmp_path.iterdir())) == 4
    compile_cache.drop_oldest(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_every_command_that_compiles_has_the_flag(capsys):
    for command in ("train", "evaluate", "generate"):
        with pytest.raises(SystemExit):
            runs.call(command, "--help")
        assert "--compilation_cache" in capsys.readouterr().out
