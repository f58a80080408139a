"""Texts for models of others come after the token that these expect."""

import json
from pathlib import Path

import pytest
import tokenizers
from drawn_models import LLAMA, make_origin

import gpt_jax
from gpt_jax.data import find_begin, resolve_tokenizer, tokenizer_from_json
from gpt_jax.errors import UsageError
from gpt_jax.infer import encode_pairs, encode_text, start_token
from gpt_jax.interop import find_tokenizer, write_directory
from gpt_jax.run.convert import write_native


def save_tokenizer(folder: Path, template: str) -> str:
    """A byte-level tokenizer.json whose post-processor adds what `template` says."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    if template:
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 256), ("</s>", 257)]
        )
    library.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


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
