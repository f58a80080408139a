"""A converted or averaged checkpoint keeps what its tasks need: labels, prompts and templates."""

import json

import pytest
from drawn_models import LLAMA, make_origin
from framed_tokenizers import save_tokenizer
from prepared import prepare, refused

from gpt_jax.data import TaskNote
from gpt_jax.data.tokens import corpus
from gpt_jax.interop import find_tokenizer, open_foreign, write_directory
from gpt_jax.run.convert import average, open_model, write_native

NOTES = tuple(TaskNote("classify", (("prompt", p), ("labels", '["a", "b"]'))) for p in "xy")


@pytest.mark.parametrize(
    "tasks, kept",
    [
        (((), ()), ()),
        ((NOTES[:1], NOTES[:1]), NOTES[:1]),
        ((NOTES[:1], NOTES[1:]), NOTES),
        (((), NOTES[:1]), NOTES[:1]),
    ],
)
def test_tasks_of_an_average(tmp_path, tasks, kept):
    """Each task is there once, and goes through two checkpoints."""
    for number, own in enumerate(tasks):
        write_native(make_origin()._replace(tasks=own), tmp_path / str(number), print)
    origins = [open_model(str(tmp_path / str(number)), 0, print) for number in range(2)]
    assert tuple(origin.tasks for origin in origins) == tasks
    write_native(average(origins, [0.5, 0.5]), tmp_path / "mean", print)
    assert open_model(str(tmp_path / "mean"), 0, print).tasks == kept


def test_a_refusal_names_the_workdir(tmp_path):
    """It does not name the copy of its tokenizer."""
    write_native(make_origin(), tmp_path / "native", print)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    given = f"--input={rows}", f"--output={tmp_path / 'out'}", "--task=chat"
    words = f"give --tokenizer={tmp_path / 'native'}+chat"
    refused(2, (words,), *given, f"--tokenizer={tmp_path / 'native'}")


def test_the_chat_template_of_a_converted_model(tmp_path):
    """`prepare` takes it from the workdir, and it goes back to Hugging Face unchanged."""
    spec = save_tokenizer(tmp_path, "<s> $A")
    origin = make_origin(LLAMA)._replace(tokenizer=find_tokenizer(tmp_path, spec))
    write_directory(origin, tmp_path / "hf")
    form = "{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    files = {
        "chat_template.jinja": form,
        "tokenizer_config.json": json.dumps({"bos_token": "<s>", "eos_token": "</s>"}),
    }
    for name, text in files.items():
        (tmp_path / "hf" / name).write_text(text)

    write_native(open_foreign(tmp_path / "hf"), tmp_path / "native", print)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    given = f"--input={rows}", "--task=chat", f"--tokenizer={tmp_path / 'native'}"
    out = prepare(tmp_path / "out", *given)
    before = (out / "corpus.json").read_bytes()
    assert (prepare(out, *given) / "corpus.json").read_bytes() == before
    options = corpus.read_manifest(out)["settings"]["task_options"]
    assert options["template"] == form
    assert json.loads(options["tokens"]) == {"bos_token": "<s>", "eos_token": "</s>"}
    tokens = corpus.open_corpus(out).sources["text"]["train"]
    assert tokens.ids(0, tokens.size)[0] == 256

    write_directory(open_model(str(tmp_path / "native"), 0, print), tmp_path / "again")
    for name, text in files.items():
        assert (tmp_path / "again" / name).read_text() == text
