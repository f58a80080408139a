"""Scores the same requests again and again: a process of harness.py, for ours or for HFLM.

    python benchmarks/harness_worker.py ours|hflm CHECKPOINT_OR_DIRECTORY

It reads a line of JSON from standard input, {"file": a JSON list of (context, continuation)}. It
answers with the seconds that scoring took, the log-probabilities and whether each is greedy.
"""

import json
import sys
import time
from types import SimpleNamespace


class Hooks:
    """The harness's cache of answers, which keeps nothing here."""

    def add_partial(self, *answer) -> None:
        pass


def load_ours(path: str):
    import jax

    from gpt_jax.evals import Subject
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

    return score


def load_hflm(path: str, batch_size: int = 16):
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=path, device="cpu", dtype="float32", batch_size=batch_size)
    return lambda requests: model.loglikelihood(requests, disable_tqdm=True)


def main() -> None:
    kind, path = sys.argv[1:]
    answers = sys.stdout
    sys.stdout = sys.stderr  # libraries print there too
    score = {"ours": load_ours, "hflm": load_hflm}[kind](path)
    for line in sys.stdin:
        with open(json.loads(line)["file"]) as file:
            requests = [SimpleNamespace(args=tuple(pair)) for pair in json.load(file)]
        begin = time.perf_counter()
        scores = score(requests)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "scores": scores}), file=answers, flush=True)


if __name__ == "__main__":
    main()
