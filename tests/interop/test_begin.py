"""Texts for models of others come after the token that these expect."""

import json

import pytest
import runs
from drawn_models import LLAMA, make_origin
from framed_tokenizers import save_tokenizer

import gpt_jax
from gpt_jax.data import find_begin, resolve_tokenizer, tokenizer_from_json, with_frame
from gpt_jax.errors import UsageError
from gpt_jax.infer import encode_pairs, encode_text, start_token
from gpt_jax.infer.text import Row
from gpt_jax.interop import find_tokenizer, open_foreign, write_directory
from gpt_jax.run.convert import open_model, write_native


def test_the_token_is_that_of_the_post_processor(tmp_path):
    tokenizer = find_tokenizer(tmp_path, save_tokenizer(tmp_path, "<s> $A"))
    assert tokenizer.begin == 256 and tokenizer.eot == 257
    assert encode_text(tokenizer, "a").tolist()[0] == 256
    assert tokenizer.encode("a").tolist() == encode_text(tokenizer, "a").tolist()[1:]
    assert start_token(tokenizer) == 256
    context, continuation = encode_pairs(tokenizer, [("a", " b")])[0]
    assert list(context) == encode_text(tokenizer, "a").tolist() and len(continuation) == 2

    again = tokenizer_from_json(tokenizer.to_json())
    assert again.begin == 256 and again.fingerprint == tokenizer.fingerprint


def test_without_a_post_processor_there_is_none(tmp_path):
    path = save_tokenizer(tmp_path, "")
    assert find_tokenizer(tmp_path, path).begin is None
    assert "begin" not in json.loads(resolve_tokenizer(path).to_json())


@pytest.mark.parametrize("template", ["<s> $A </s>", "<s> </s> $A"])
def test_more_than_one_token_is_refused(tmp_path, template):
    with pytest.raises(UsageError, match="adds more than one token"):
        find_begin(resolve_tokenizer(save_tokenizer(tmp_path, template)))


def test_a_prompt_is_read_after_it(tmp_path):
    """Through a conversion, and the text of an empty prompt is that after the token alone."""
    tokenizer = find_tokenizer(tmp_path, save_tokenizer(tmp_path, "<s> $A"))
    origin = make_origin(LLAMA)._replace(tokenizer=tokenizer)
    write_native(origin, tmp_path / "native", print)
    write_directory(origin._replace(carried={}), tmp_path / "hf")

    for path in ("native", "hf"):
        loaded = gpt_jax.load(str(tmp_path / path), devices=1, say=lambda line: None)
        assert len(loaded.logits("ab")) == 3
        whole = loaded.logits([256, 97])
        assert loaded.logits("")[0].tolist() == whole[0].tolist()


@pytest.mark.parametrize(
    "files, ends",
    [
        ({"generation_config.json": {"eos_token_id": [97, 257]}, "config.json": {}}, (97,)),
        ({"config.json": {"eos_token_id": 98}}, (98,)),
        ({"config.json": {"eos_token_id": 257}}, ()),
        ({"config.json": {"eos_token_id": [10**6]}}, ()),
        ({}, ()),
    ],
)
def test_the_ids_that_end_a_text(tmp_path, files, ends):
    save_tokenizer(tmp_path, "")
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    tokenizer = find_tokenizer(tmp_path)
    assert tokenizer.ends == ends
    assert tokenizer_from_json(tokenizer.to_json()).ends == ends


def test_a_text_ends_at_each_of_them(tmp_path):
    tokenizer = with_frame(resolve_tokenizer("bytes"), None, [98])
    row = Row(tokenizer, (), 5)
    assert [row.push(token) for token in (97, 98)] == ["a", ""] and row.finish == "eot"


def test_special_ids_and_the_family_are_kept(tmp_path):
    """Through a checkpoint, although a family before it would fit as well."""
    origin = make_origin(tokenizer=save_tokenizer(tmp_path, ""))
    write_directory(origin, tmp_path / "a", family="mistral")
    values = json.loads((tmp_path / "a/config.json").read_text())
    values |= {"eos_token_id": [257, 97], "bos_token_id": 256, "pad_token_id": 5}
    (tmp_path / "a/config.json").write_text(json.dumps(values))

    write_native(open_foreign(tmp_path / "a"), tmp_path / "native", print)
    write_directory(open_model(str(tmp_path / "native"), 0, print), tmp_path / "b")
    again = json.loads((tmp_path / "b/config.json").read_text())
    assert again == values and again["model_type"] == "mistral"


def test_a_run_from_such_a_model_sees_it_and_keeps_it(tmp_path):
    """A run cannot be resumed with documents that begin otherwise."""
    tokenizer = find_tokenizer(tmp_path, save_tokenizer(tmp_path, "<s> $A"))
    write_directory(make_origin(LLAMA)._replace(tokenizer=tokenizer), tmp_path / "hf")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} of all"}) + "\n" for i in range(40)))
    flags = runs.arguments(
        tmp_path,
        tmp_path / "run",
        "--config.init.model=checkpoint",
        f"--config.init.from={tmp_path / 'hf'}",
        "--config.data.tokenizer=",
        "--config.train.seq_len=16",
        "--config.train.steps=2",
        "--config.eval.batches=1",
        f"--config.data.path={text}",
    )
    runs.call(*flags, "--config.data.begin=true")
    loaded = gpt_jax.load(str(tmp_path / "run"), devices=1, say=lambda line: None)
    assert loaded.tokenizer.begin == 256 and loaded.config.data.begin

    code, line = runs.refusal(*flags)
    assert code == 2 and "data.begin (True there, False now)" in line
