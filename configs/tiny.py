"""The smallest model that uses the whole road, for tests: seconds on a CPU.

    gpt-jax train --config=configs/tiny.py --config.data.path=some.txt --workdir=runs/tiny

34,944 parameters on bytes. Sizes divide by 2 and 4, so that any mesh of up to 8 devices with
`tensor` at most 4 takes it. Expected: the loss starts at 5.6 (ln 264) and falls; 20 steps learn
nothing worth sampling.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise ValueError(f"tiny has no variants, got {arg!r}")
    return ConfigDict(
        dict(
            model=dict(layers=2, embed=32, heads=4, vocab_multiple=8),
            data=dict(tokenizer="bytes", workers=1),
            optim=dict(learning_rate=1e-2, warmup_steps=2),
            train=dict(steps=20, batch_size=8, seq_len=32),
            eval=dict(every_steps=10, sample_tokens=16),
            checkpoint=dict(every_steps=10),
            log=dict(every_steps=1, tensorboard=False),
        )
    )
