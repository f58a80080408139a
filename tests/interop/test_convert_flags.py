"""Flags of `gpt-jax convert` that have no effect, and targets that cannot be."""

import pytest
from drawn_models import make_origin

from gpt_jax.commands.main import run_to_end
from gpt_jax.interop.export import write_directory
from gpt_jax.run.convert import write_native

IGNORED = {
    "tokenizer": (["--tokenizer=bytes"], "is a checkpoint of ours; leave it out"),
    "ignore_keys": (["--ignore_keys", "a"], "is a checkpoint of ours; leave it out"),
    "dtype": (["--format=native", "--dtype=bfloat16"], "is for --format=hf; leave it out"),
    "family": (["--format=native", "--family=gpt2"], "is for --format=hf; leave it out"),
    "shares": (["--weights", "inf"], "--weights=inf: expected 0 to"),
    "read only": (["--family=nanogpt"], "nanogpt can only be read"),
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_flag_without_effect_is_refused(tmp_path, name):
    write_native(make_origin(), tmp_path / "native", print)
    given, text = IGNORED[name]
    base = ["convert", "--from", str(tmp_path / "native"), f"--to={tmp_path / 'new'}"]
    code, reason = run_to_end([*base, *given])
    assert code == 2 and text in reason and not (tmp_path / "new").exists()


REFUSED_TARGETS = {"hf/new": "lies in", "hf": "lies in", "": "an empty path names nothing"}


@pytest.mark.parametrize("target", REFUSED_TARGETS)
def test_a_target_that_cannot_be_is_refused(tmp_path, target):
    write_directory(make_origin(), tmp_path / "hf")
    to = tmp_path / target if target else ""
    code, reason = run_to_end(["convert", "--from", str(tmp_path / "hf"), f"--to={to}"])
    assert code == 2 and REFUSED_TARGETS[target] in reason
