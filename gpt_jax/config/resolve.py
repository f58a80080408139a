"""Fields that are derived from other fields."""

import dataclasses

from gpt_jax.config.fields import Config
from gpt_jax.config.model_fields import Compute, Model
from gpt_jax.config.run_fields import Optim


def resolve(config: Config, vocab: int = 0) -> Config:
    """Fills in the fields whose value 0 means "derived".

    `vocab` is the tokenizer's size. If it is 0, the size is not known yet.
    """
    model = config.model
    train = config.train

    # Heads that do not divide embed leave a head_dim of 0, which the checks refuse.
    head_dim = 0 if model.embed % model.heads else model.embed // model.heads
    mlp = model.mlp or 4 * model.embed
    multiple = model.vocab_multiple
    full_model = dataclasses.replace(
        model,
        kv_heads=model.kv_heads or model.heads,
        head_dim=model.head_dim or head_dim,
        mlp=mlp,
        expert_mlp=model.expert_mlp or mlp,
        max_seq=model.max_seq or train.seq_len,
        vocab=model.vocab or round_up(vocab, multiple),
    )

    decay_steps = config.optim.decay_steps or max(1, train.steps)
    eval_batch_size = config.eval.batch_size or train.batch_size
    return dataclasses.replace(
        config,
        model=full_model,
        optim=dataclasses.replace(config.optim, decay_steps=decay_steps),
        eval=dataclasses.replace(config.eval, batch_size=eval_batch_size),
    )


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def wsd_start(optim: Optim) -> int:
    """The step at which the schedule wsd begins to decay."""
    return optim.decay_steps - round(optim.decay_fraction * optim.decay_steps)


def for_inference(model: Model, compute: Compute) -> tuple[Model, Compute]:
    """Leaves out what only training does: dropout, computing activations again, and fp8.

    A scale of fp8 is that of all rows and tokens together. So a text would depend on the other
    prompts, and on whether its keys are cached.
    """
    model = dataclasses.replace(model, dropout=0.0, attention_dropout=0.0)
    return model, dataclasses.replace(set_remat(compute, "none"), matmul_dtype="compute")


def describe_inference(compute: Compute) -> list[str]:
    """A line about matmuls that `for_inference` does in another dtype than training; [] if none."""
    if compute.matmul_dtype == "compute":
        return []
    return [
        f"config.compute.matmul_dtype = {compute.matmul_dtype!r} is for training, because its "
        f"scales are those of all rows together; here matmuls are in {compute.dtype}"
    ]


def set_remat(compute: Compute, remat: str) -> Compute:
    """`compute` with another remat policy. The names of the old one are for that one alone."""
    return dataclasses.replace(compute, remat=remat, remat_save=(), remat_offload=())
