"""A command line, a config file or a prompt that cannot be used is refused in one line."""

import json

import pytest
import runs
from refusals import TEXT, on_data, refused

LINES = {
    "unknown command": (
        ["trian"],
        ["unknown command 'trian'", "train, evaluate, classify, generate"],
    ),
    "no config": (["train", "--workdir=x"], ["--config", "train --help"]),
    "no workdir": (["train", f"--config={runs.TINY}"], ["--workdir is missing"]),
    "bad flag": (
        ["train", f"--config={runs.TINY}", "--workdirs=x"],
        ["unknown argument '--workdirs=x'"],
    ),
    "bad flag of generate": (
        ["generate", "--checkpoint=x", "--temprature=1"],
        ["--temprature=1", "generate --help"],
    ),
    "not a number": (
        ["generate", "--checkpoint=x", "--temperature=hot"],
        ["--temperature", "'hot'"],
    ),
    "no checkpoint given": (["evaluate"], ["--checkpoint", "evaluate --help"]),
    "negative batches": (
        ["evaluate", "--checkpoint=x", "--batches=-1"],
        ["--batches", "0 or more"],
    ),
    "override without a value": (
        ["train", f"--config={runs.TINY}", "--config.seed"],
        ["--config.seed", "needs a value"],
    ),
    "no such config": (
        ["train", f"--config={runs.ROOT}/configs/tyni.py"],
        ["tyni.py", "no such file", "tiny.py"],
    ),
    "no such variant": (
        ["train", f"--config={runs.TINY}:large"],
        ["tiny.py:large", "no variants", "'large'"],
    ),
    "no such preset": (
        ["train", f"--config={runs.ROOT}/configs/gpt2.py:9b"],
        ["gpt2.py:9b", "124m"],
    ),
    "bad profile": (
        ["train", f"--config={runs.TINY}", "--workdir=x", "--profile=9:3"],
        ["--profile=9:3", "START:STOP"],
    ),
    "profile beyond the end": (
        ["train", f"--config={runs.TINY}", "--workdir=x", "--profile=9:30"],
        ["<= 20 steps"],
    ),
    "processes without address": (
        ["evaluate", "--checkpoint=x", "--num_processes=2"],
        ["--num_processes=2", "--coordinator=HOST:PORT"],
    ),
    "address without processes": (
        ["evaluate", "--checkpoint=x", "--coordinator=h:1"],
        ["--coordinator=h:1", "--num_processes=N"],
    ),
    "no process": (
        ["evaluate", "--checkpoint=x", "--num_processes=0"],
        ["--num_processes=0", "1 or more"],
    ),
    "fewer than no devices": (
        ["evaluate", "--checkpoint=x", "--cpu_devices=-3"],
        ["--cpu_devices=-3", "expected 0 to 1024"],
    ),
    "one device of one process": (
        ["evaluate", "--checkpoint=x", "--local_device=1"],
        ["--local_device=1", "CUDA_VISIBLE_DEVICES=1"],
    ),
    "longer than anybody waits": (
        [
            "evaluate",
            "--checkpoint=x",
            "--coordinator=h:1",
            "--num_processes=2",
            "--join_seconds=3000000000",
        ],
        ["--join_seconds=3000000000", "expected 1 to 86400"],
    ),
    "heartbeats once a century": (
        ["evaluate", "--checkpoint=x", "--heartbeat_seconds=99999999999999999"],
        ["--heartbeat_seconds=99999999999999999", "expected 1 to 86400"],
    ),
    "devices of several": (
        ["generate", "--checkpoint=x", "--devices=2", "--cpu_devices=4"],
        ["--devices=2", "leave it out"],
    ),
    "devices of generate": (
        ["generate", "--checkpoint=x", "--devices=-1"],
        ["--devices=-1", "0 or more"],
    ),
    "print_config checks": (
        ["train", f"--config={runs.TINY}", "--print_config", "--config.model.heads=5"],
        ["config.model.heads = 5"],
    ),
    "process beyond the job": (
        ["evaluate", "--checkpoint=x", "--process_id=1"],
        ["--process_id=1", "expected 0 to 0"],
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_command_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, words = LINES[name]
    refused(2, words, *command)
    assert not list(tmp_path.iterdir())


FILES = {
    "syntax error": ("def get_config(:\n", ["line 1"]),
    "other mistake": ("def get_config():\n    return nothing\n", ["nothing"]),
    "an exit": ("raise SystemExit(7)\n", ["SystemExit: 7"]),
    "no such module": ("import no_such_module_at_all\n", ["no_such_module_at_all"]),
    "no get_config": ("values = 1\n", ["has no get_config()"]),
    "not a ConfigDict": ("def get_config():\n    return None\n", ["get_config()"]),
    "unknown key": (
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict(dict(model=dict(layer=2)))\n",
        ["config.model.layer = 2", "config.model.layers?"],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_config_file(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / "mine.py").write_text(content)
    words = words if "unknown" in name else ["mine.py", *words]
    refused(2, words, "train", f"--config={tmp_path}/mine.py", f"--workdir={tmp_path}/run")


def test_prompts(trained, tmp_path, capsys):
    generate = "generate", f"--checkpoint={trained}", "--max_new_tokens=4"
    refused(
        2,
        ["prompt 1 has 40 tokens", "context holds 32", "31 or fewer", "--truncate"],
        *generate,
        f"--prompt={'a' * 40}",
    )
    capsys.readouterr()
    runs.call(*generate, f"--prompt={'a' * 40}", "--truncate")
    assert "kept the last 28 of 40 tokens, cut the first 12" in capsys.readouterr().err
    (tmp_path / "windows.txt").write_bytes("\ufeffab\r\ncd\r\n".encode())
    capsys.readouterr()
    runs.call(*generate, f"--prompts={tmp_path}/windows.txt", "--json")
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == [
        "ab",
        "cd",
    ]
    refused(2, ["--top_k = 9999999999", "from 0 to"], *generate, "--top_k=9999999999")
    refused(2, ["--prompts=none.txt", "cannot be read"], *generate, "--prompts=none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    refused(2, ["latin.txt", "cannot be read"], *generate, f"--prompts={tmp_path}/latin.txt")
    refused(2, ["--top_p = 2.0", "from 0.0 to 1.0"], *generate, "--top_p=2")
    refused(2, ["--num_samples = 0", "at least 1"], *generate, "--num_samples=0")
    refused(2, ["--stop = ''"], *generate, "--stop=")


def test_prompt_unknown_to_the_character_tokenizer(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_bytes(TEXT * 40)
    runs.call(*on_data(tmp_path, "a.txt", "--config.data.tokenizer=char"))
    generate = "generate", f"--checkpoint={tmp_path}/run"
    refused(
        2, ["character 6, '我'", "char tokenizer", "leave it out"], *generate, "--prompt=plain 我"
    )
    refused(2, ["prompt 1 is empty", "give a prompt"], *generate)
