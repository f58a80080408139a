"""Scoring questions behind one text that is read once, beside whole rows, in turns.

    python benchmarks/prefixes.py [--rounds=3] [--record]

A model in the shape of Llama, 4 layers of 512, has drawn weights. Each question has four
continuations of 8 tokens, and all questions of a case begin with one text. Both ways are asked in
turn, and the first pass of each compiles and does not count. CPU time is that of all threads, and
the least of the other passes counts, as it does by the clock. A machine that does other work says
little by the clock. `tokens` are the padded ones that are read. With `--record` it writes
prefixes.json beside this file.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import jax
import numpy as np

from gpt_jax import config
from gpt_jax.infer import Request, fit_request, prefixes, score, score_requests
from gpt_jax.infer.score_rows import group_by_context, list_lengths
from gpt_jax.model import init_params

HERE = Path(__file__).resolve().parent
SHAPE = dict(
    layers=4,
    embed=512,
    heads=8,
    kv_heads=4,
    mlp=1408,
    max_seq=1024,
    vocab=4096,
    position="rotary",
    norm="rmsnorm",
    pattern=(("attention", "swiglu"),),
    bias=False,
    tied=False,
)
# (tokens of the text, tokens of a question, questions)
CASES = ((400, 60, 24), (150, 60, 24), (60, 60, 24), (30, 100, 24))
WAYS = ("whole rows", "behind the text")


def draw(text: int, question: int, questions: int) -> list[Request]:
    rng = np.random.default_rng(0)
    start = rng.integers(0, SHAPE["vocab"], text)
    requests = []
    for _ in range(questions):
        context = np.concatenate([start, rng.integers(0, SHAPE["vocab"], question)])
        requests += [Request(context, rng.integers(0, SHAPE["vocab"], 8)) for _ in range(4)]
    return requests


def count_tokens(model: config.Model, requests: list[Request], text: int) -> dict[str, int]:
    fitted = [fit_request("request", one, model.max_seq, model.vocab) for one in requests]
    contexts = group_by_context(fitted, model)
    behind = list_lengths(fitted, contexts, model.max_seq, text)
    return {
        "whole rows": sum(list_lengths(fitted, contexts, model.max_seq)),
        "behind the text": prefixes.count_behind(text, behind, model.max_seq, 1),
    }


def compare(model: config.Model, params, case: tuple[int, int, int], rounds: int) -> dict:
    requests = draw(*case)
    compute = config.Compute(dtype="float32")
    make_groups = prefixes.make_groups
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu_seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    scores = {}
    for _ in range(rounds):
        for way in WAYS:
            is_behind = way == "behind the text"
            score.make_groups = lambda *args, wanted=is_behind: make_groups(*args[:3], wanted)
            begin, cpu = time.perf_counter(), time.process_time()
            scores[way] = score_requests(model, compute, params, requests, print)
            seconds[way].append(time.perf_counter() - begin)
            cpu_seconds[way].append(time.process_time() - cpu)

    pairs = zip(*scores.values(), strict=True)
    return {
        "case": case,
        "tokens": count_tokens(model, requests, case[0]),
        "seconds": {way: min(found[1:]) for way, found in seconds.items()},
        "cpu seconds": {way: min(found[1:]) for way, found in cpu_seconds.items()},
        "largest difference": float(max(abs(a.logprobs - b.logprobs).max() for a, b in pairs)),
    }


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--record", action="store_true")
    args = flags.parse_args()

    model = config.resolve(config.Config(model=config.from_dict(SHAPE, config.Model))).model
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    # What pays is what is measured here, so each text is taken out.
    prefixes.DEARER = 0.0
    rows = []
    for case in CASES:
        rows.append(compare(model, params, case, args.rounds))
        print(json.dumps(rows[-1]), flush=True)

    if args.record:
        made = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.date.today().isoformat(),
            "load": os.getloadavg()[2],
            "rounds": args.rounds,
            "rows": rows,
        }
        (HERE / "prefixes.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
