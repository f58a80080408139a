"""Random compositions of settings.

`draw(seed)` chooses a model, masks, an optimiser and a way to compute them. `comparisons.py` trains
each with a mesh and without one. The command for thousands is benchmarks/compositions.py.
"""

from dataclasses import dataclass, replace

import numpy as np

from gpt_jax import config
from gpt_jax.config import knobs
from gpt_jax.errors import UsageError
from gpt_jax.model.attention.kernels import choose_kernel, make_problem

STEPS = 3
SHARE = 4  # seeds in a row that share model, masks and optimiser, and so one run without a mesh
TRIES = 20  # ways that are tried on a mesh before another is drawn
DEVICES = (1, 2, 2, 3, 4, 4, 4, 6, 8, 8, 8, 8, 8, 8)
RATES = {"adamw": 1e-3, "adafactor": 1e-2, "lion": 3e-4, "sgd": 1e-2, "muon": 3e-3}


@dataclass(frozen=True)
class Masks:
    """What the columns of a batch say about documents, targets and order."""

    documents: str  # plain, two, many, or padded: many and then padding
    targets: str  # all, some, or few: whole rows without any
    prefix: bool  # whether documents begin with a part that sees itself both ways


@dataclass(frozen=True)
class Draw:
    """A composition. `refused` has a line for each one that was drawn before it and refused."""

    seed: int
    settings: config.Config  # resolved, with a concrete kernel
    masks: Masks
    refused: tuple[str, ...] = ()

    @property
    def shape(self) -> dict[str, int]:
        """Axis sizes of the mesh above 1."""
        sizes = config.mesh_shape(self.settings.mesh, _count_devices(self.settings.mesh))
        return {axis: size for axis, size in sizes.items() if size > 1}


class _Chooser:
    """Choices from one generator of random numbers."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def of(self, *options):
        return options[self.rng.integers(len(options))]

    def sometimes(self, part: float, value, otherwise):
        return value if self.rng.random() < part else otherwise


def _draw_attention(c: _Chooser) -> dict:
    heads = c.of(4, 4, 6, 8, 8)
    after_rope = c.of(False, True)
    return dict(
        heads=heads,
        kv_heads=c.of(0, 0, 1, 2, 4, heads // 2),
        head_dim=c.of(0, 0, 4, 8),
        windows=c.of((0,), (0,), (5,), (3, 0)),
        last_window_full=c.of(False, True),
        qk_norm=c.of(False, False, True),
        qk_norm_after_rope=after_rope,
        qk_scale=c.of(1.0, 1.0, 1.2),
        attention_softcap=c.of(0.0, 0.0, 0.0, 20.0),
    )


def _draw_experts(c: _Chooser) -> dict:
    experts = c.of(4, 6, 8, 8)
    return dict(
        experts=experts,
        experts_per_token=c.of(1, 2, 2, 3),
        expert_mlp=c.of(0, 12, 16),
        expert_ffn=c.of("swiglu", "swiglu", *knobs.DENSE_FFNS),
        shared_experts=c.of(0, 0, 1, 2),
        router=c.of(*knobs.ROUTERS),
        router_normalize=c.of(False, True),
        router_z_loss=c.of(0.0, 1e-3),
        balance=c.of(*knobs.BALANCES),
        dispatch=c.of(*knobs.DISPATCHES),
        capacity_factor=c.of(0.5, 1.25),
    )


def _draw_model(c: _Chooser) -> config.Model:
    dense = tuple(("attention", c.of(*knobs.DENSE_FFNS)) for _ in range(c.of(1, 1, 1, 2)))
    moe = ("attention", "moe")
    bias = c.of(False, True)
    dropout = c.sometimes(0.1, 0.1, 0.0)
    return config.Model(
        layers=c.of(1, 2, 2, 2, 3, 4),
        embed=c.of(16, 24, 32, 32, 48),
        mlp=c.of(0, 32, 48),
        vocab=c.of(48, 48, 48, 50),
        max_seq=c.of(0, 160),
        pattern=c.of(dense, dense, dense, (moe,), (dense[0], moe)),
        norm=c.of(*knobs.NORMS),
        norm_position=c.of("pre", "pre", "pre", "post"),
        embed_norm=c.of(False, False, True),
        final_norm=c.of(True, True, False),
        position=c.of("rotary", "rotary", *knobs.POSITIONS),
        rope_base=c.of(100.0, 10_000.0),
        rope_fraction=c.of(1.0, 1.0, 0.5),
        rope_scale_factor=c.of(1.0, 1.0, 2.0),
        rope_scale_original_seq=32,
        logit_softcap=c.of(0.0, 0.0, 15.0),
        tied=c.of(False, True),
        bias=bias,
        qkv_bias=c.of(False, True),
        dropout=dropout,
        attention_dropout=c.of(0.0, dropout),
        value_embed=c.sometimes(0.25, True, False),
        residual_scalars=c.sometimes(0.25, True, False),
        smear=c.sometimes(0.25, True, False),
        smear_gate=5,
        backout=c.sometimes(0.25, True, False),
        **_draw_attention(c),
        **_draw_experts(c),
    )


def _draw_more_of_model(c: _Chooser, model: config.Model) -> config.Model:
    """Fields of other projects' families, of which some do not go with others.

    They are drawn last, so that a seed has the rest that it had without them.
    """
    place = c.of(model.norm_position, model.norm_position, "sandwich", "branch")
    parallel = c.sometimes(0.3, True, False)
    biased = c.of("none", *knobs.BIASED)
    return replace(
        model,
        norm_position=place,
        parallel=parallel and place == "pre",
        biased="none" if model.bias else biased,
        embed_scale=c.of(1.0, 1.0, 4.0),
        rope_local_base=c.of(0.0, 0.0, 30.0),
        rope_scaling=c.of(*knobs.ROPE_SCALINGS),
        qk_norm_over=c.of("head", *knobs.QK_NORMS),
        attention_scale=c.of(0.0, 0.0, 0.3),
    )


def _draw_optim(c: _Chooser) -> config.Optim:
    name = c.of("adamw", *knobs.OPTIMIZERS)
    embedding = config.Group(match="embed|head", optimizer=c.of("adamw", "sgd", "lion"), rate=0.5)
    return config.Optim(
        optimizer=name,
        learning_rate=RATES[name],
        b1=c.of(0.5, 0.9),
        eps=1e-6,
        weight_decay=c.of(0.0, 0.1),
        decay=c.of("matrices", "matrices", "all"),
        clip=c.of(0.0, 0.1, 1.0),
        schedule=c.of(*knobs.SCHEDULES),
        warmup_steps=c.of(0, 0, 2),
        decay_steps=8,
        groups=c.sometimes(0.2, (embedding,), ()),
        muon_iterations=2,  # each is compiled
        muon_momentum_warmup=c.of(0, 2),
        muon_cautious=c.of(False, True),
        muon_decay_to_zero=c.of(False, True),
        muon_normalize=c.of(False, True),
    )


def _draw_meaning(c: _Chooser) -> tuple[config.Config, Masks]:
    """What decides the result, as the plain config that the comparison is made with."""
    train = config.Train(
        steps=STEPS,
        batch_size=c.of(8, 16, 16, 24, 32),
        seq_len=c.of(16, 16, 32, 48, 160),
        z_loss=c.of(0.0, 1e-3),
        label_smoothing=c.of(0.0, 0.1),
        ema=c.of(0.0, 0.0, 0.9),
    )
    settings = config.Config(
        model=_draw_model(c),
        compute=config.Compute(kernel="reference"),
        mesh=config.Mesh(data=1),
        optim=_draw_optim(c),
        train=train,
    )
    masks = Masks(
        c.of("plain", "two", "many", "padded"),
        c.of("all", "some", "few"),
        c.sometimes(0.2, True, False),
    )
    settings = replace(settings, model=_draw_more_of_model(c, settings.model))
    return config.resolve(settings), masks


def _draw_mesh(c: _Chooser) -> config.Mesh:
    devices = c.of(*DEVICES)
    sizes = dict.fromkeys(config.AXES, 1)
    for prime in (2, 3):
        while devices % prime == 0:
            sizes[c.of(*config.AXES)] *= prime
            devices //= prime

    split = [axis for axis, size in sizes.items() if size % 2 == 0]
    if split and c.sometimes(0.15, True, False):
        axis = c.of(*split)
        sizes[axis] //= 2
        sizes[f"dcn_{axis}"] = 2
    return config.Mesh(**sizes, zero=c.of(3, 3, 3, 1))


def _draw_way(c: _Chooser, plain: config.Config, mesh: config.Mesh) -> config.Config:
    """`plain` on a mesh, computed in another way."""
    compute = config.Compute(
        kernel=c.of("auto", "auto", "reference", "blocked", "ring", "ring", "xla"),
        remat=c.of("none", "none", "block", "dots"),
        unroll=c.of(1, 1, 2, 0),
        shard_sequence=c.of(False, False, True),
        pipeline_rounds=c.of(1, 1, 2),
        pipeline_microbatches=c.of(0, 0, 2, 4),
    )
    train = replace(plain.train, accumulate=c.of(1, 1, 2, 4), loss_chunk=c.of(0, 0, 4, 8, 6))
    return replace(plain, compute=compute, mesh=mesh, train=train)


def _count_devices(mesh: config.Mesh) -> int:
    return config.least_devices(mesh)


def _check(settings: config.Config, masks: Masks) -> config.Config:
    """`settings` with a concrete kernel. Raises UsageError for what the program refuses."""
    shape = config.check(settings, _count_devices(settings.mesh))
    model, compute = settings.model, settings.compute
    problem = make_problem(
        model, compute.dtype, settings.train.seq_len, "cpu", masks.prefix, shape["context"]
    )
    kernel, _ = choose_kernel(compute.kernel, problem)
    return replace(settings, compute=replace(compute, kernel=kernel))


def _redraw(make):
    """The first of `make(attempt)` that is not refused, and the lines of those that were."""
    refused = []
    for attempt in range(10_000):
        try:
            return make(attempt), tuple(refused)
        except UsageError as error:
            refused.append(str(error))
    raise RuntimeError(f"nothing that is drawn runs; the last: {refused[-1]}")


def draw(seed: int) -> Draw:
    """The composition of this seed. The program's own checks accept it."""
    first = seed // SHARE

    def make_meaning(attempt):
        settings, masks = _draw_meaning(_Chooser(first, attempt))
        return _check(settings, masks), masks

    (plain, masks), refused = _redraw(make_meaning)

    def make_way(attempt):
        # A mesh is tried several times. Large ones would hardly come up otherwise.
        mesh = _draw_mesh(_Chooser(first, seed, attempt // TRIES, 0))
        way = _draw_way(_Chooser(first, seed, attempt, 1), plain, mesh)
        return _check(way, masks)

    settings, more = _redraw(make_way)
    return Draw(seed, settings, masks, refused + more)


def make_plain(settings: config.Config) -> config.Config:
    """What a draw is compared with. Dropout draws anew for each microbatch, so it keeps those."""
    model, train = settings.model, settings.train
    accumulate = train.accumulate if model.dropout or model.attention_dropout else 1
    return replace(
        settings,
        compute=config.Compute(kernel="reference"),
        mesh=config.Mesh(data=1),
        train=replace(train, accumulate=accumulate, loss_chunk=0),
    )


def describe(settings: config.Config) -> dict[str, object]:
    """The fields that are not at their defaults, by path, for a summary and for the eye."""
    default = config.flatten(config.resolve(config.Config()))
    return {key: value for key, value in config.flatten(settings).items() if value != default[key]}
