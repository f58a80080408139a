"""Scores requests or tasks: a process of harness.py or harness_tasks.py, for ours or for HFLM.

    python benchmarks/harness_worker.py ours|hflm CHECKPOINT_OR_DIRECTORY

It reads lines of JSON from standard input. To {"file": a JSON list of (context, continuation)} it
answers with the seconds that scoring took, the log-probabilities and whether each is greedy. To
{"folder": tasks in YAML, "names": some of them, "limit": questions of each} it answers with the
metrics of the tasks and the log-probabilities of all their requests.
"""

import json
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple


class Hooks:
    """The harness's cache of answers, which keeps nothing here."""

    def add_partial(self, *answer) -> None:
        pass


class Asked(NamedTuple):
    """The ways to ask one model."""

    score: Callable[[list], list]
    run_tasks: Callable[[dict], dict]


def load_ours(path: str) -> Asked:
    import jax

    from gpt_jax.evals import Subject, TaskSettings, run_tasks
    from gpt_jax.evals.harness_model import HarnessMethods
    from gpt_jax.run import load_model

    loaded = load_model(path, 0, lambda line: None)
    settings = loaded.config
    subject = Subject(settings.model, settings.compute, loaded.params, loaded.tokenizer)
    methods = HarnessMethods(subject, lambda line: None)
    methods.cache_hook = Hooks()

    def score(requests):
        with jax.set_mesh(loaded.mesh):
            return methods.loglikelihood(requests)

    def run_native(asked):
        settings = TaskSettings(
            asked["names"], asked["folder"], limit=asked["limit"], log_samples=True
        )
        with jax.set_mesh(loaded.mesh):
            return run_tasks(subject, settings, lambda line: None)

    return Asked(score, run_native)


def load_hflm(path: str, batch_size: int = 16) -> Asked:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=batch_size)

    def run_reference(asked):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        return simple_evaluate(
            model,
            tasks=asked["names"],
            task_manager=TaskManager(include_path=asked["folder"], include_defaults=False),
            limit=asked["limit"],
            log_samples=True,
            bootstrap_iters=1000,
        )

    return Asked(lambda requests: model.loglikelihood(requests, disable_tqdm=True), run_reference)


def list_scores(samples: list[dict]) -> list[float]:
    """The log-probability of each request of a task, in the order of its questions."""
    return [
        float(response[0][0])
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        for response in sample["resps"]
    ]


def answer(model: Asked, question: dict) -> dict:
    begin = time.perf_counter()
    if "names" in question:
        results = model.run_tasks(question)
        scores = {name: list_scores(found) for name, found in results["samples"].items()}
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "scores": scores, "results": results["results"]}

    with open(question["file"]) as file:
        requests = [SimpleNamespace(args=tuple(pair)) for pair in json.load(file)]
    begin = time.perf_counter()
    scores = model.score(requests)
    return {"seconds": time.perf_counter() - begin, "scores": scores}


def main() -> None:
    kind, path = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print there too
    model = {"ours": load_ours, "hflm": load_hflm}[kind](path)
    for line in sys.stdin:
        found = answer(model, json.loads(line))
        print(json.dumps(found, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()
