"""Overrides of the command line are read by the type of their field."""

import re

import pytest
from small_configs import refuses

from gpt_jax import config
from gpt_jax.config import from_dict
from gpt_jax.errors import UsageError


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("seed", "7", 7),
        ("train.steps", "1_000", 1000),
        ("train.steps", "1e4", 10_000),
        ("mesh.data", "-1", -1),
        ("optim.learning_rate", "3e-4", 3e-4),
        ("optim.learning_rate", "1", 1.0),
        ("model.bias", "false", False),
        ("model.bias", "True", True),
        ("model.norm", "rmsnorm", "rmsnorm"),
        ("data.path", "a.txt", ("a.txt",)),
        ("data.path", "a.txt,b/*.md", ("a.txt", "b/*.md")),
        ("data.path", "('a,b.txt',)", ("a,b.txt",)),
        ("data.encodings", "utf-8,gb18030", ("utf-8", "gb18030")),
        ("eval.sample_prompts", "Hello, world", ("Hello, world",)),
        ("eval.sample_prompts", "('Hello, world', 'b')", ("Hello, world", "b")),
        ("eval.sample_prompts", "", ()),
        ("data.tokenizer", "bpe:512", "bpe:512"),
        ("model.windows", "0", (0,)),
        ("model.windows", "8,8,0", (8, 8, 0)),
        ("model.windows", "(8, 0)", (8, 0)),
        ("model.pattern", "(('attention','relu2'),)", (("attention", "relu2"),)),
        ("optim.groups", "({'match': 'x'},)", (config.Group(match="x"),)),
        ("optim.groups", "()", ()),
    ],
)
def test_override_by_the_type_of_the_field(key, text, expected):
    values = {"model": {"layers": 2}}
    config.override(values, key, text)
    value = from_dict(values)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)
    assert from_dict(values).model.layers == 2


def test_a_comma_in_a_path_that_is_there_separates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(text):
        values = {}
        config.override(values, "data.path", text)
        return from_dict(values).data.path

    (tmp_path / "part,1.txt").write_text("")
    assert read("part,1.txt") == ("part,1.txt",)
    assert read("part,*.txt") == ("part,*.txt",)
    assert read("part,2.txt") == ("part", "2.txt")

    # Both can be meant, so the user has to say which.
    (tmp_path / "part").mkdir()
    assert read("part,1.txt") == ("part,1.txt",)
    (tmp_path / "1.txt").write_text("")
    with pytest.raises(UsageError) as refusal:
        read("part,1.txt")
    one, several = re.findall(r'"(\(.*?\))"', str(refusal.value))
    assert read(one) == ("part,1.txt",) and read(several) == ("part", "1.txt")


@pytest.mark.parametrize(
    "key, text, words",
    [
        ("modle.layers", "3", ("config.modle", "did you mean config.model?")),
        ("model.layer", "3", ("config.model.layer", "did you mean config.model.layers?")),
        ("model.layers.x", "3", ("config.model.layers.x", "unknown key")),
        ("model", "3", ("config.model", "section", "layers")),
        ("seeds", "3", ("did you mean config.seed?",)),
        ("train.steps", "many", ("config.train.steps = 'many'", "expected int")),
        ("train.steps", "2.5", ("config.train.steps", "expected int")),
        ("train.steps", "2.5e0", ("config.train.steps", "expected int")),
        ("train.steps", "1e999", ("config.train.steps", "expected int")),
        ("train.steps", "", ("config.train.steps", "expected int")),
        ("model.bias", "maybe", ("config.model.bias", "expected bool")),
        ("optim.learning_rate", "fast", ("config.optim.learning_rate", "expected float")),
        ("model.windows", "8,a", ("config.model.windows", "expected tuple")),
        ("model.windows", "(8", ("config.model.windows", "expected tuple")),
    ],
)
def test_override_refuses(key, text, words):
    refuses(lambda: config.override({}, key, text), *words)


def test_an_override_is_checked_like_a_file():
    values = {}
    config.override(values, "optim.learning_rate", "nan")
    refuses(lambda: from_dict(values), "config.optim.learning_rate", "finite")
