"""Tasks of lm-evaluation-harness on one checkpoint: our model beside HFLM, from local files.

    python3 -m venv reference
    reference/bin/pip install torch transformers "lm_eval[hf]"
    python benchmarks/harness_tasks.py --reference=reference/bin/python --data=DIR [--record]

`--data` is a folder with the files of llm-foundry: arc_easy.jsonl, piqa.jsonl, copa.jsonl and
lambada_openai.jsonl, perhaps as .xz. A small model is trained on Python's standard library, and
its copy for `transformers` is written with `gpt-jax convert`. Both answer the first questions of
each task without examples, and the harness computes the metrics. This Python needs the extra
`eval`. With `--record` it writes harness_tasks.json beside this file.
"""

import argparse
import datetime
import json
import lzma
import os
import platform
import sys
import tempfile
from pathlib import Path

from harness import VOCAB, Worker, make_models

HERE = Path(__file__).resolve().parent
SHAPE = dict(layers=4, embed=128, heads=4, kv_heads=2, mlp=352, max_seq=512, vocab=VOCAB)
TRAINING = {"train.steps": 60, "train.batch_size": 4, "optim.warmup_steps": 10}
METRICS = ("acc", "acc_norm")


def write_choice(text: str, metrics: tuple[str, ...] = METRICS) -> dict:
    """A task that chooses among texts."""
    return {
        "output_type": "multiple_choice",
        "doc_to_text": text,
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": " ",
        "metric_list": list_metrics(metrics),
    }


def list_metrics(names: tuple[str, ...]) -> list[dict]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


LAMBADA = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "target_delimiter": " ",
    "metric_list": list_metrics(("acc",)),
}
# name of the task and its file -> what the harness asks
TASKS = {
    "arc_easy": write_choice("{{query}}\nAnswer:"),
    "piqa": write_choice("{{query.strip()}}\nAnswer:"),
    "copa": write_choice("{{query}}"),
    "lambada_openai": LAMBADA,
}


def write_tasks(data: Path, folder: Path) -> list[str]:
    """Writes the files and the YAML of the tasks. JSON is YAML, too."""
    names = []
    for name, asked in TASKS.items():
        file = data / f"{name}.jsonl"
        packed = data / f"{name}.jsonl.xz"
        content = file.read_bytes() if file.exists() else lzma.decompress(packed.read_bytes())
        copy = folder / f"{name}.jsonl"
        copy.write_bytes(content)

        task = {
            "task": f"local_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(copy)}},
            "test_split": "test",
            "num_fewshot": 0,
            **asked,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))
        names.append(task["task"])
    return names


def compare(name: str, answers: dict[str, dict]) -> dict:
    """What both say of one task."""
    scores = {kind: answer["scores"][name] for kind, answer in answers.items()}
    pairs = list(zip(scores["ours"], scores["hflm"], strict=True))
    metrics = {
        kind: {
            key.replace(",none", ""): value
            for key, value in answer["results"][name].items()
            if key.split(",")[0].removesuffix("_stderr") in METRICS
        }
        for kind, answer in answers.items()
    }
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    return {"requests": len(pairs), "largest difference": largest, **metrics}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--reference", required=True, help="a Python with torch and lm_eval")
    flags.add_argument("--data", type=Path, required=True)
    flags.add_argument("--limit", type=int, default=200, help="questions of each task")
    flags.add_argument("--record", action="store_true")
    args = flags.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(folder / "cache_of_datasets")
        checkpoint, directory = make_models(folder, SHAPE, TRAINING)
        names = write_tasks(args.data, folder)
        workers = {
            "ours": Worker(sys.executable, "ours", checkpoint),
            "hflm": Worker(args.reference, "hflm", directory),
        }
        asked = {"folder": str(folder), "names": names, "limit": args.limit}
        answers = {kind: worker.ask(**asked) for kind, worker in workers.items()}
        for worker in workers.values():
            worker.process.kill()

    tasks = {name: compare(name, answers) for name in names}
    print(json.dumps(tasks, indent=1))
    if args.record:
        made = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.date.today().isoformat(),
            "shape": SHAPE,
            "training": TRAINING,
            "limit": args.limit,
            "tasks": tasks,
        }
        (HERE / "harness_tasks.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
