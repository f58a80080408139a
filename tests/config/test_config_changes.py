"""Changes between two configs, and configs of earlier versions."""

import dataclasses

import pytest
from small_configs import refuses

from gpt_jax import config
from gpt_jax.config import Config, from_dict
from gpt_jax.config.read import RENAMED
from gpt_jax.errors import UsageError


def test_no_change():
    assert config.changes(Config(), Config()) == []


@pytest.mark.parametrize(
    "sections, resumable",
    [
        (dict(log=dict(every_steps=3)), True),
        (dict(eval=dict(every_steps=3)), True),
        (dict(mesh=dict(fsdp=2)), True),
        (dict(checkpoint=dict(keep_last=9)), True),
        (dict(train=dict(steps=5)), True),
        (dict(compute=dict(remat="block")), True),
        (dict(compute=dict(remat_save=("q",))), True),
        (dict(compute=dict(remat_offload=("q",))), True),
        (dict(optim=dict(state_memory="host")), True),
        (dict(train=dict(accumulate=2)), True),
        (dict(optim=dict(learning_rate=1.0)), True),
        (dict(model=dict(layers=9)), False),
        (dict(model=dict(windows=(4, 0))), False),
        (dict(seed=1), False),
        (dict(train=dict(batch_size=9)), True),
        (dict(train=dict(seq_len=9)), False),
        (dict(data=dict(path=("x",))), True),
        (dict(data=dict(tokenizer="char")), False),
        (dict(optim=dict(groups=(dict(match="x"),))), False),
        (dict(optim=dict(optimizer="lion")), False),
        (dict(optim=dict(weight_decay=0.3)), True),
        (dict(optim=dict(b1=0.8)), False),
        (dict(init={"from": "x"}), False),
    ],
)
def test_changes_name_the_key_and_say_whether_a_run_may_resume(sections, resumable):
    ((section, fields),) = sections.items()
    key = section if not isinstance(fields, dict) else f"{section}.{next(iter(fields))}"
    ((found, before, after, effect),) = config.changes(Config(), from_dict(sections))
    assert (found, before, after, effect is not None) == (
        key,
        config.flatten(Config())[key],
        config.flatten(from_dict(sections))[key],
        resumable,
    )


def test_the_key_from_is_a_word_of_python():
    values = dict(init={"from": "runs/a@3"})
    made = from_dict(values)
    assert made.init.from_ == "runs/a@3"
    assert config.to_dict(made)["init"]["from"] == "runs/a@3" and config.read_saved(values) == made
    typed = {}
    config.override(typed, "init.from", "runs/a@3")
    assert typed == values
    refuses(lambda: from_dict(dict(init=dict(from_="x"))), "did you mean config.init.from?")
    assert "from" in config.make_schema()["properties"]["init"]["properties"]
    assert "--config.init.from=''" in config.describe_config("init.from")


def test_resumable_names_exist():
    known = set(config.flatten(Config())) | {field.name for field in dataclasses.fields(Config)}
    assert set(config.RESUMABLE) <= known


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_key_is_answered_with_its_new_name(old, new):
    section, key = old.split(".")
    words = f"^config.{old} = .*: is config.{new} now$"
    with pytest.raises(UsageError, match=words):
        config.from_dict({section: {key: 1}})
    with pytest.raises(UsageError, match=words):
        config.override({}, old, "1")


def test_configs_of_earlier_checkpoints_are_translated():
    old = {
        "seed": 3,
        "model": {"layers": 2, "dtype": "bfloat16", "pipeline_rounds": 2},
        "data": {"rows": "chunk", "apart": True, "stages": [[5, [1.0, 2.0]]]},
        "train": {"steps": 7, "compiler_options": ["a=1"]},
    }
    wanted = config.Config(
        seed=3,
        model=config.Model(layers=2),
        compute=config.Compute(dtype="bfloat16", pipeline_rounds=2, compiler_options=("a=1",)),
        data=config.Data(packing="chunk", document_mask=True, phases=((5, (1.0, 2.0)),)),
        train=config.Train(steps=7),
    )

    assert config.read_saved(old) == wanted
    assert config.read_saved(config.to_dict(wanted)) == wanted
