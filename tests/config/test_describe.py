"""What the config says of itself: help, schema and the page of the manual."""

import dataclasses
import json
import re
from pathlib import Path

import jsonschema
import pytest

from gpt_jax import config
from gpt_jax.commands.main import main
from gpt_jax.config.describe import list_entries
from gpt_jax.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kind", [config.Config, config.Group])
def test_every_field_says_what_it_is(kind):
    for entry in list_entries(kind):
        text = entry.spec.metadata["help"]
        assert text.endswith("."), entry.key
        longest = max(len(sentence.split()) for sentence in re.split(r"(?<=[.;:]) ", text))
        assert longest <= 25, entry.key


def test_a_field_a_section_and_everything():
    one = config.describe_config("data.packing")
    assert one.splitlines()[0] == (
        "--config.data.packing='window'  (str, one of window, chunk, document, first_fit, best_fit)"
    )
    section = config.describe_config("data")
    assert one in section and "config.model" not in section
    assert section in config.describe_config()
    with pytest.raises(
        UsageError, match=r"data\.packin: unknown key; did you mean data\.packing\?"
    ):
        config.describe_config("data.packin")


def test_the_schema_takes_what_the_config_takes():
    schema = config.make_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    whole = config.to_dict(config.Config(optim=config.Optim(groups=(config.Group(),))))
    assert list(validator.iter_errors(whole)) == []
    for wrong in ({"model": {"layers": 0}}, {"model": {"layer": 1}}, {"data": {"packing": "x"}}):
        assert len(list(validator.iter_errors(wrong))) == 1


def test_the_page_is_made_from_the_fields():
    """Make it anew by `gpt-jax train --describe_config=page >docs/configs.md`."""
    assert (ROOT / "docs/configs.md").read_text() == config.make_page()


@pytest.mark.parametrize(
    "flag, wanted",
    [
        ("--describe_config=model.layers", config.describe_config("model.layers") + "\n"),
        ("--describe_config", config.describe_config() + "\n"),
        ("--describe_config=page", config.make_page()),
        ("--json_schema", json.dumps(config.make_schema(), indent=2) + "\n"),
    ],
)
def test_the_command_prints_them(flag, wanted, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", flag])
    assert ended.value.code == 0
    assert capsys.readouterr().out == wanted


def test_all_faults_are_told_at_once():
    wrong = {"model": {"layers": 0, "wide": 3}, "train": {"steps": "many"}}
    with pytest.raises(UsageError) as caught:
        config.from_dict(wrong)
    lines = str(caught.value).split("\n")
    assert [line.split(" = ")[0] for line in lines] == [
        "config.model.layers",
        "config.model.wide",
        "config.train.steps",
    ]

    train = dataclasses.replace(config.Config().train, seq_len=100, loss_chunk=3)
    model = dataclasses.replace(config.Config().model, heads=3)
    both = config.resolve(config.Config(model=model, train=train))
    with pytest.raises(UsageError) as caught:
        config.check(both)
    assert [line.split(" = ")[0] for line in str(caught.value).split("\n")] == [
        "config.model.heads",
        "config.train.loss_chunk",
    ]
