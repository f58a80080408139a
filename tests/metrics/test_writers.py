"""Writers: metrics.jsonl, TensorBoard, the bar, and all of them together."""

import contextlib
import io
import json
import math
import resource

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2 as proto

from gpt_jax.errors import SaveFailed
from gpt_jax.metrics import writers


def strict(line):
    """json.loads that refuses NaN and Infinity, because those are no JSON."""

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(line, parse_constant=refuse)


class Terminal(io.StringIO):
    def isatty(self):
        return True


# --- jsonl ---


def test_jsonl_is_strict_json_and_reads_back(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = writers.JsonlWriter(path)
    writer.write(1, {"train/loss": jnp.float32(2.5), "a": math.nan, "b": -math.inf})
    writer.text(2, "sample/0", "我是\u2028<b>\ud800\n")
    assert len(path.read_bytes().splitlines()) == 2  # on disk before close

    writer.close()
    rows = [strict(line) for line in path.read_text("utf-8").split("\n") if line]
    nonfinite = {"a": "nan", "b": "-inf"}
    assert rows == [
        {"step": 1, "train/loss": 2.5, "a": None, "b": None, "nonfinite": nonfinite},
        {"step": 2, "sample/0": "我是\u2028<b>?\n"},
    ]
    assert writers.read_jsonl(path) == rows


def write_steps(path, steps, resumed_at=None):
    writer = writers.JsonlWriter(path, resumed_at)
    for step in steps:
        writer.write(step, {"train/loss": 1.0 / (step + 1)})
    writer.close()


def test_resumed_jsonl_equals_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(8))
    write_steps(tmp_path / "cut", range(6))
    with open(tmp_path / "cut", "ab") as file:
        file.write(b'{"step": 6, "train/lo')  # a kill in the middle of a line
    write_steps(tmp_path / "cut", range(4, 8), resumed_at=3)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_run_without_a_checkpoint_starts_an_empty_file(tmp_path):
    write_steps(tmp_path / "m", range(3))
    write_steps(tmp_path / "m", range(1))
    assert [row["step"] for row in writers.read_jsonl(tmp_path / "m")] == [0]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("nonsense", "not JSON"),
        ("", "not JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("[1]", "expected an object, got a list"),
        ('{"loss": 1}', "step: missing"),
        ('{"step": null}', "step: expected a count, got null"),
        ('{"step": Infinity}', "step: expected a count, got Infinity"),
        ('{"step": -1}', "step: expected a count"),
        ('{"step": true}', "step: expected a count"),
        ('{"step": 1' + "0" * 400 + "}", "step: expected a count"),
        ('{"step": 1, "train/loss": "low"}', "'train/loss': expected a number or null"),
        ('{"step": 1, "time/wall_seconds": null}', "'time/wall_seconds': expected a finite number"),
        ('{"step": 1, "sample/0": 3}', "'sample/0': expected a text"),
        ('{"step": 1, "session/number": "one"}', "'session/number': expected a finite number"),
    ],
)
def test_a_damaged_line_is_left_out_and_named(tmp_path, line, reason):
    """It keeps no run from going on, and the file that goes on is without it."""
    path = tmp_path / "m"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\nnonsense\n')
    said = []
    assert writers.read_jsonl(path, said.append) == [{"step": 1}, {"step": 2}]
    assert len(said) == 1 and f"{path}: damaged, so line 2 (" in said[0]
    assert reason in said[0] and "and 1 more is left out" in said[0]

    writers.JsonlWriter(path, 2, said.append).close()
    assert said[1] == said[0]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_in_the_place_of_the_log_is_moved_aside(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "mine").touch()
    said = []
    assert writers.read_jsonl(path, said.append) == []
    writers.JsonlWriter(path, 3, said.append).close()
    assert path.read_bytes() == b"" and (tmp_path / "m.1/mine").exists()
    assert "earlier metrics are left out" in said[0] and f"it is now {tmp_path / 'm.1'}" in said[1]


def test_missing_and_torn_files_read_as_what_is_whole(tmp_path):
    assert writers.read_jsonl(tmp_path / "absent") == []
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}')
    assert writers.read_jsonl(tmp_path / "m") == [{"step": 1}]


def test_a_full_disk_is_one_line_with_its_exit_code():
    writer = writers.JsonlWriter.__new__(writers.JsonlWriter)
    writer.path = "/dev/full"
    writer._file = open("/dev/full", "ab", buffering=0)
    with writer._file, pytest.raises(SaveFailed, match=r"/dev/full.*No space left"):
        writer.write(1, {"x": 1.0})


@contextlib.contextmanager
def files_at_most(size: int):
    """Writing more than `size` bytes to any file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_tensorboard_and_does_not_block_it(tmp_path):
    writer = writers.TensorBoardWriter(tmp_path, every_seconds=0.0)
    with files_at_most(4096), pytest.raises(SaveFailed, match=str(tmp_path)):
        for step in range(1000):
            writer.write(step, {"train/loss": 1.0})


def test_save_file_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    writers.save_file(tmp_path / "f", b"old")

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gpt_jax.files.sync_file", fail)
    with pytest.raises(SaveFailed):
        writers.save_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


# --- people ---


def test_the_eta_goes_by_work_where_steps_are_not_equal():
    moments = iter([0.0, 24.0, 24.0])  # the second line asks twice
    out = io.StringIO()
    bar = writers.BarWriter(
        total=10, stream=out, every_seconds=1, now=lambda: next(moments), work=lambda step: step**2
    )
    bar.write(1, {"train/loss": 3.0})
    bar.write(5, {"train/loss": 3.0})
    bar.close()
    # 24 of 99 parts took 24 s.
    assert out.getvalue().splitlines()[1].endswith("ETA 1:15")


def test_plain_lines_come_every_so_often_and_at_the_end():
    seconds = [100.0]
    out = io.StringIO()
    bar = writers.BarWriter(total=100, stream=out, every_seconds=10, now=lambda: seconds[0])
    for step in range(0, 101, 10):
        bar.write(step, {"train/loss": 3.0, "throughput/tokens_per_second": 12345.0})
        seconds[0] += 4
    bar.write(100, {"eval/loss": 2.0, "eval/bits_per_byte": 1.5})
    bar.text(100, "sample/0", "def f():\n  pass")
    bar.close()
    lines = out.getvalue().splitlines()
    progress = [line.split()[1] for line in lines if line.startswith("step") and "/100" in line]

    assert progress == ["0/100", "30/100", "60/100", "90/100", "100/100"]
    assert lines[1] == "step 30/100  loss 3.0000  12.3k tok/s  ETA 0:28"
    assert lines[5:] == [
        "step 100  held-out loss 2.0000  1.5000 bits/byte",
        "step 100  sample/0",
        "    def f():",
        "      pass",
    ]


def test_bar_on_a_terminal_shows_the_step_and_progress_off_does_not():
    outs = [Terminal(), Terminal()]
    for out, progress in zip(outs, (True, False), strict=True):
        bar = writers.BarWriter(total=50, start=20, stream=out, progress=progress)
        bar.write(50, {"train/loss": 3.25, "throughput/tokens_per_second": 900.0})
        bar.write(50, {"eval/loss": 2.125})
        bar.close()
        assert "held-out loss 2.1250" in out.getvalue() and "900 tok/s" in out.getvalue()
    assert "50/50  loss 3.2500" in outs[0].getvalue() and "\r" in outs[0].getvalue()
    assert "\r" not in outs[1].getvalue()


def test_text_that_the_terminal_cannot_show_does_not_stop_the_run():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    writers.BarWriter(total=1, stream=out).text(1, "sample/0", "我 ok")
    assert b"? ok" in raw.getvalue()


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (3723.4, "1:02:03")])
def test_duration(seconds, text):
    assert writers.duration(seconds) == text


@pytest.mark.parametrize(
    "number, text", [(0, "0"), (12.34, "12.3"), (999, "999"), (12345, "12.3k"), (2.5e9, "2.5B")]
)
def test_human(number, text):
    assert writers.human(number) == text


def test_tensorboard_events_hold_what_was_written(tmp_path):
    writer = writers.TensorBoardWriter(tmp_path, resumed_at=4)
    writer.write(5, {"train/loss": 2.5})
    writer.text(5, "sample/0", "我\nx")
    writer.close()
    data = next(tmp_path.iterdir()).read_bytes()
    events = []
    while data:  # a record: u64 length, u32 checksum, payload, u32 checksum
        length = int.from_bytes(data[:8], "little")
        events.append(proto.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    values = [(event.step, value) for event in events for value in event.summary.value]
    assert (5, "train/loss", 2.5) in [(step, v.tag, v.simple_value) for step, v in values]
    assert any(
        "我\n    x" in v.tensor.string_val[0].decode() for _, v in values if v.tensor.string_val
    )
    # TensorBoard drops what it has of steps from 5 on.
    assert any(event.step == 5 and event.HasField("session_log") for event in events)


def test_writers_fan_out_and_close_all():
    log = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def write(self, step, values):
            log.append((self.name, step, values))

        def text(self, step, key, text):
            log.append((self.name, step, key, text))

        def close(self):
            log.append((self.name, "closed"))
            if self.name == "b":
                raise OSError("b")

    both = writers.Writers([Fake("a"), Fake("b")])
    both.write(1, {"x": 2.0})
    both.text(1, "k", "t")
    with pytest.raises(OSError):
        both.close()
    written = [("a", 1, {"x": 2.0}), ("b", 1, {"x": 2.0}), ("a", 1, "k", "t"), ("b", 1, "k", "t")]
    assert log[:4] == written
    assert sorted(log[4:]) == [("a", "closed"), ("b", "closed")]
    writers.Writers().write(1, {})
