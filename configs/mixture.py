"""Several sources mixed by weight, packed whole: English novels, a Chinese history and small talk
in both languages.

    gpt-jax prepare --input gutenberg=novels.jsonl zizhitongjian=history.jsonl chatterbot=talk.jsonl \\
        --tokenizer=bpe:4096 --eval_fraction=0.05 --output=runs/mixture_data
    gpt-jax train --config=configs/mixture.py:runs/mixture_data --workdir=runs/mixture

The argument is the prepared folder. Any other sources: `--config.data.sources="(('name', 'path',
0.5), …)"`, each path a prepared folder or text files. Weights are parts of the tokens, exact in
every block of 1,000 rows; for the last third of the run small talk counts three times as much
(`phases`). Rows hold whole documents, best fit, that do not see each other.

The model and its rates are those of `quickstart.py`.
"""

from ml_collections import ConfigDict
from quickstart import get_config as quickstart

WEIGHTS = {"gutenberg": 0.45, "zizhitongjian": 0.5, "chatterbot": 0.05}


def get_config(arg: str = "runs/mixture_data") -> ConfigDict:
    config = quickstart()
    config.optim.eps = (
        1e-6  # Adam's 1e-8 turns rounding of near-zero gradients into steps of the rate's size
    )
    train = config.train
    tokens = train.steps * train.batch_size * train.seq_len
    config.data = ConfigDict(
        dict(
            sources=tuple((name, arg, weight) for name, weight in WEIGHTS.items()),
            phases=((tokens * 2 // 3, (0.4, 0.45, 0.15)),),
            packing="best_fit",
            document_mask=True,
        )
    )
    config.eval = ConfigDict(
        dict(every_steps=100, sample_tokens=60, sample_prompts=("She said ", "皇帝", "你好"))
    )
    return config
