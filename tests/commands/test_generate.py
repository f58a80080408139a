"""`gpt-jax generate` writes the text that was asked for, and nothing more."""

import io
import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import runs

from gpt_jax.model.transformer import Transformer
from gpt_jax.run import restore as load

CHINESE = "我是一个程序员，我喜欢读书。🎉"


@pytest.fixture(scope="module")
def chinese(folder):
    """A run on bytes that knows one line of Chinese by heart."""
    text = folder / "chinese.txt"
    text.write_text((CHINESE + "\n") * 300)
    runs.call(
        *runs.arguments(
            folder,
            folder / "chinese",
            f"--config.data.path={text}",
            "--config.train.steps=150",
            "--config.train.seq_len=64",
            "--config.eval.every_steps=0",
            "--config.optim.schedule=constant",
            "--config.checkpoint.every_steps=0",
        )
    )
    return folder / "chinese"


def plain_greedy(workdir: Path, prompt: str, count: int) -> str:
    """Greedy text without cache, batch and buckets: each token takes a pass over the whole text."""
    loaded = load.load_model(str(workdir), 0, lambda line: None, 1)
    model, ids = loaded.config.model, list(loaded.tokenizer.encode(prompt))
    with jax.set_mesh(loaded.mesh):
        forward = jax.jit(
            partial(Transformer(model, loaded.config.compute).apply, {"params": loaded.params})
        )
        for _ in range(count):
            tokens = np.zeros((1, model.max_seq), np.int32)
            tokens[0, : len(ids)] = ids
            ids.append(
                int(
                    np.asarray(forward({"tokens": tokens}))[
                        0, len(ids) - 1, : loaded.tokenizer.vocab
                    ].argmax()
                )
            )
    return loaded.tokenizer.decode(ids[-count:])


def test_greedy_equals_the_plain_loop(call, trained):
    """The same text comes each time, from a checkpoint that was written on another mesh.

    Standard output has the text and nothing else.
    """
    command = (
        "generate",
        f"--checkpoint={trained}",
        "--prompt=abc de",
        "--temperature=0",
        "--max_new_tokens=20",
    )
    out, err = call(*command)
    assert out == plain_greedy(trained, "abc de", 20) and len(out) == 20
    assert call(*command, "--seed=5")[0] == out
    for only in ("--top_k=1", "--top_p=1e-6", "--min_p=1"):  # each leaves the most likely token
        assert call(*command[:3], command[4], "--temperature=1", "--seed=5", only)[0] == out
    assert call(*command, "--repetition_penalty=3")[0] != out
    assert "20 tokens in" in err and "ended by length" in err


def test_generate_several(call, trained, tmp_path):
    """--prompt, --prompts, samples and JSON lines go together.

    A row is the same as when it is generated alone.
    """
    (tmp_path / "prompts.txt").write_text("he\nabc de\n")
    command = (
        "generate",
        f"--checkpoint={trained}",
        "--prompt=é",
        f"--prompts={tmp_path}/prompts.txt",
        "--max_new_tokens=8",
        "--num_samples=2",
        "--seed=3",
    )
    rows = [json.loads(line) for line in call(*command, "--json")[0].splitlines()]
    assert [(row["prompt"], row["sample"]) for row in rows] == [
        (p, s) for p in ("é", "he", "abc de") for s in range(2)
    ]
    assert all(set(row) == {"prompt", "sample", "text", "finish", "tokens"} for row in rows)
    assert all(row["finish"] in ("length", "eot") and row["tokens"] <= 8 for row in rows)
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == 6
    assert call(*command)[0] == "".join(text + "\n" for text in texts)
    one = "generate", f"--checkpoint={trained}", "--prompt=he", "--max_new_tokens=8", "--seed=3"
    assert call(*one)[0] == texts[2]
    assert call(*one[:-1], "--seed=4")[0] != texts[2]


def test_generate_step(call, trained):
    command = "generate", f"--checkpoint={trained}", "--prompt=abc", "--max_new_tokens=24"
    newest, older = call(*command)[0], call(*command, "--step=5")[0]
    assert newest != older
    assert call("generate", f"--checkpoint={trained}/checkpoints/5", *command[2:])[0] == older


def test_generate_stop(call, chinese):
    command = "generate", f"--checkpoint={chinese}", "--temperature=0", f"--prompt=\n{CHINESE[:4]}"
    assert call(*command, "--max_new_tokens=36")[0].startswith(CHINESE[4:])
    assert (
        call(*command, "--stop=喜欢", "--stop=书", "--max_new_tokens=36")[0]
        == CHINESE[4 : CHINESE.index("喜")]
    )
    [row] = call(*command, "--json", "--stop=\n")[0].splitlines()
    assert json.loads(row)["text"] == CHINESE[4:] and json.loads(row)["finish"] == "stop"


class Terminal(io.TextIOWrapper):
    """Standard output that keeps what was written, piece by piece."""

    def __init__(self):
        self.pieces, raw = [], io.RawIOBase()
        raw.writable, raw.write = (
            lambda: True,
            lambda data: self.pieces.append(bytes(data)) or len(data),
        )
        super().__init__(
            io.BufferedWriter(raw), encoding="ascii"
        )  # which keeps what is not flushed


def test_streaming_never_cuts_a_character(monkeypatch, chinese):
    """A character of several tokens comes whole, and as soon as it is complete."""
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        runs.call(
            "generate",
            f"--checkpoint={chinese}",
            "--temperature=0",
            f"--prompt=\n{CHINESE[:3]}",
            "--stop=\n",
        )
    assert [piece.decode() for piece in terminal.pieces if piece] == [*CHINESE[3:]]


def test_bpe_from_text_to_text(call, folder):
    """A tokenizer is trained on Chinese, and a model on its tokens.

    Both commands then need the checkpoint alone.
    """
    file = folder / "bpe.txt"
    file.write_text((CHINESE + "\n") * 300)
    call(
        *runs.arguments(
            folder,
            folder / "bpe",
            f"--config.data.path={file}",
            "--config.data.tokenizer=bpe:280",
            "--config.train.steps=100",
            "--config.eval.every_steps=0",
            "--config.optim.schedule=constant",
        )
    )
    out, _ = call(
        "generate",
        f"--checkpoint={folder / 'bpe'}",
        "--temperature=0",
        f"--prompt={CHINESE[:4]}",
        "--stop=\n",
    )
    assert len(out) >= 5 and set(out) <= set(CHINESE)  # whole characters, all of them known
    row = json.loads(
        call("evaluate", f"--checkpoint={folder / 'bpe'}", f"--text={file}", "--json")[0]
    )["sources"][str(file)]
    assert (
        row["bytes"] == pytest.approx(300 * len((CHINESE + "\n").encode()), rel=1e-3)
        and row["tokens"] < row["bytes"] / 2
    )
    assert row["bits_per_byte"] == pytest.approx(
        row["loss"] * row["tokens"] / row["bytes"] / math.log(2), rel=1e-5
    )


def test_a_process_writes_the_text_alone(tmp_path, trained):
    process = runs.Process(
        tmp_path,
        [
            "generate",
            f"--checkpoint={trained}",
            "--prompt=abc de",
            "--temperature=0",
            "--max_new_tokens=20",
            "--cpu_devices=2",
        ],
    )
    process.end(0)
    assert process.out == plain_greedy(trained, "abc de", 20)
    assert "on 2 cpu devices" in process.err
