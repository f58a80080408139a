"""The methods that lm-evaluation-harness asks of a model. They work without its package."""

from collections.abc import Callable
from typing import Any

from gpt_jax.evals.subject import Subject
from gpt_jax.evals.until import count_default_tokens, generate_until
from gpt_jax.infer import (
    Request,
    encode_pairs,
    make_rolling_requests,
    score_requests,
    start_token,
)


class HarnessMethods:
    """A Subject with the methods of a model of the harness, but without its base class.

    The base class has the `cache_hook`, which keeps answers where the harness is asked to.

    Each process of a job says that it is the only one. Rows are split over the mesh below, so all
    processes ask the same and get the same.
    """

    cache_hook: Any

    def __init__(self, subject: Subject, report: Callable[[str], None]):
        super().__init__()
        self._subject = subject
        self._report = report

    @property
    def rank(self) -> int:
        return 0

    @property
    def world_size(self) -> int:
        return 1

    @property
    def max_length(self) -> int:
        return self._subject.model.max_seq

    @property
    def max_gen_toks(self) -> int:
        return count_default_tokens(self.max_length)

    @property
    def eot_token_id(self) -> int:
        return start_token(self._subject.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs):
        """The ids of a text. Special tokens are never added, as in training."""
        return self._subject.tokenizer.encode(string).tolist()

    def tok_decode(self, tokens, **kwargs) -> str:
        return self._subject.tokenizer.decode(tokens)

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it greedy) of each (context, continuation)."""
        texts = [request.args for request in requests]
        pairs = encode_pairs(self._subject.tokenizer, texts)
        return self._loglikelihood_tokens(
            [(text, *pair) for text, pair in zip(texts, pairs, strict=True)]
        )

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs):
        scores = self._score([Request(context, ids) for _, context, ids in requests])
        answers = [(score.total, score.is_greedy) for score in scores]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, whose tokens are scored once each, in windows."""
        texts = [request.args[0] for request in requests]
        windows = [
            make_rolling_requests(ids, self.prefix_token_id, self.max_length)
            for ids in self._subject.tokenizer.encode_batch(texts)
        ]
        scores = iter(self._score([window for own in windows for window in own]))
        totals = [sum(next(scores).total for _ in own) for own in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt, up to a stop string."""
        asked = [request.args for request in requests]
        texts = generate_until(self._subject, asked, self._report)
        for args, text in zip(asked, texts, strict=True):
            self.cache_hook.add_partial("generate_until", args, text)
        return texts

    def _score(self, requests: list[Request]):
        model, compute, params, _ = self._subject
        return score_requests(model, compute, params, requests, self._report)
