"""Random compositions of settings, each trained with a mesh and without one, for comparison.

`draw(seed)` chooses a model, masks, an optimiser and a way to compute them. `compare(draw)` trains
it for STEPS updates twice: on one device without a mesh, plainly, and in the way that was drawn.
The command for thousands is benchmarks/compositions.py.
"""

from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from meshes import remember

from gpt_jax import config
from gpt_jax.config import knobs
from gpt_jax.errors import UsageError
from gpt_jax.model.attention.kernels import choose_kernel, make_problem
from gpt_jax.model.parameters import describe_parameter
from gpt_jax.model.transformer import abstract_params
from gpt_jax.run.parts import make_network
from gpt_jax.sharding import layout, rows
from gpt_jax.sharding.mesh import join_path, make_mesh
from gpt_jax.train.optim.optimizer import make_optimizer, make_zero1
from gpt_jax.train.step import init_state, train_step

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


class Differences(NamedTuple):
    """How far the two runs are apart.

    `metrics` has parts of a value, the largest of all steps. `gradients` has those of the first
    step by path, as parts of the leaf's largest entry. `updates` has by path the part of a leaf's
    entries whose change over all steps differs by more than 1e-3 of the largest change.
    """

    metrics: dict[str, float]
    gradients: dict[str, float]
    updates: dict[str, float]
    losses: tuple[float, ...]


# ---- drawing ----


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


# ---- the batch and the parameters ----


def _cut_documents(masks: Masks, length: int, rng) -> list[int]:
    """Lengths of a row's documents; the last is padding where `masks` says so."""
    if masks.documents == "plain":
        return [length]
    if masks.documents == "two":
        return [length // 2 - 1, length - length // 2 + 1]
    cuts = np.sort(rng.choice(np.arange(1, length), size=3, replace=False))
    return np.diff([0, *cuts, length]).tolist()


def make_columns(settings: config.Config, masks: Masks) -> dict[str, np.ndarray]:
    """A batch in numpy: the same for both runs."""
    train = settings.train
    count, length, vocab = train.batch_size, train.seq_len, settings.model.vocab
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, vocab, (count, length + 1))
    weight = np.ones((count, length), np.float32)
    if masks.targets != "all":
        weight = (rng.random(weight.shape) < rng.random((count, 1))).astype(np.float32)
    if masks.targets == "few":
        weight[rng.random(count) < 0.5] = 0
        weight[0, 0] = 1

    segment = np.zeros((count, length), np.int32)
    position = np.zeros((count, length), np.int32)
    ar = np.ones((count, length), np.int32)
    for row in range(count):
        sizes = _cut_documents(masks, length, rng)
        segment[row] = np.repeat(np.arange(len(sizes)) + 1, sizes)
        position[row] = np.concatenate([np.arange(size) for size in sizes])
        prefix = rng.integers(1, 5, len(sizes)).repeat(sizes)
        ar[row] = (position[row] == 0) | (position[row] >= prefix)
        if masks.documents == "padded":
            padding = segment[row] == len(sizes)
            segment[row, padding] = 0
            weight[row, padding] = 0

    columns = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weight": weight}
    columns["bytes"] = rng.integers(1, 5, (count, length))
    if masks.documents != "plain":
        columns |= {"segment": segment, "position": position}
    if masks.prefix:
        columns["ar"] = ar
    return columns


def make_params(model: config.Model):
    """Normal draws in numpy, so that no zeros hide a wrong sum."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.float32(0.2 * rng.standard_normal(x.shape)), abstract_params(model)
    )


# ---- training ----


class Run(NamedTuple):
    """What a training gave, in numpy."""

    metrics: list[dict[str, np.ndarray]]  # a step each, divided
    gradients: dict[str, np.ndarray]  # of the first step
    changes: dict[str, np.ndarray]  # of parameters and averages over all steps


def _by_path(tree) -> dict[str, np.ndarray]:
    return {join_path(keys): np.asarray(x) for keys, x in jax.tree_util.tree_leaves_with_path(tree)}


def train(settings: config.Config, masks: Masks) -> Run:
    """Trains on the current mesh, or without one."""
    model = settings.model
    like = abstract_params(model)
    start = make_params(model)
    params, columns = start, make_columns(settings, masks)
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        params = jax.tree.map(
            lambda x, y: jax.device_put(x, NamedSharding(mesh, y.sharding.spec)), start, like
        )
        columns = rows.to_devices(mesh, columns, settings.train.batch_size)

    rule = make_optimizer(settings.optim, like, describe_parameter, balance_rate=model.balance_rate)
    tx = optax.chain(remember(), rule)
    if settings.mesh.zero == 1:
        tx = make_zero1(tx, partial(layout.lay_out_like, like=like), layout.gather_fsdp)
        params = layout.gather_fsdp(params)
    network = make_network(model, settings.compute)
    state = jax.jit(lambda params: init_state(params, tx, settings.train))(params)
    step = jax.jit(partial(train_step, network=network, tx=tx, train=settings.train))

    metrics, gradients, key = [], {}, jax.random.key(3)
    for _ in range(STEPS):
        state, sums = step(state, {}, columns, key)
        metrics.append({name: np.asarray(a) / float(b) for name, (a, b) in sums.items()})
        gradients = gradients or _by_path(state.opt[0])

    before = _by_path(start)
    changes = {path: x - before[path] for path, x in _by_path(state.params).items()}
    if state.ema:
        changes |= {f"ema/{path}": x - before[path] for path, x in _by_path(state.ema).items()}
    return Run(metrics, gradients, changes)


@lru_cache(maxsize=4)
def train_alone(plain: config.Config, masks: Masks) -> Run:
    """Trains on one device without a mesh."""
    with jax.default_device(jax.devices()[0]):
        return train(plain, masks)


def train_on_mesh(drawn: Draw) -> Run:
    """Trains on the mesh of the draw."""
    mesh = drawn.settings.mesh
    count = _count_devices(mesh)
    shape = config.mesh_shape(mesh, count)
    devices = jax.devices()[:count]
    with jax.set_mesh(make_mesh(shape, devices, across=config.cross_slice(mesh))):
        return train(drawn.settings, drawn.masks)


# ---- comparing ----


def _largest(x) -> float:
    return float(np.max(np.abs(x), initial=0.0))


def measure(ours: Run, theirs: Run) -> Differences:
    """How far `ours` is from `theirs`."""
    metrics: dict[str, float] = {}
    for now, plain in zip(ours.metrics, theirs.metrics, strict=True):
        for name, value in now.items():
            # Shares and losses near 0 are measured against 1 %.
            apart = _largest(value - plain[name]) / max(_largest(plain[name]), 1e-2)
            metrics[name] = float(np.max([apart, metrics.get(name, 0.0)]))  # keeps a NaN

    # The gradient of key biases is zero but for rounding.
    largest = max(map(_largest, theirs.gradients.values()))
    gradients = {
        path: _largest(ours.gradients[path] - plain) / max(_largest(plain), 1e-2 * largest)
        for path, plain in theirs.gradients.items()
    }

    updates = {}
    for path, plain in theirs.changes.items():
        # Some optimisers make steps of rounding alone, of whole leaves or of single entries.
        gradient = np.abs(theirs.gradients[path.removeprefix("ema/")])
        if gradient.max() > 1e-3 * largest:
            same = np.abs(ours.changes[path] - plain) <= 1e-3 * _largest(plain) + SPACING
            updates[path] = float(np.mean(~same & (gradient > ROUNDING * gradient.max())))
    losses = tuple(float(now["loss"]) for now in theirs.metrics)
    return Differences(metrics, gradients, updates, losses)


def compare(drawn: Draw) -> Differences:
    """Trains the draw in both ways."""
    alone = train_alone(make_plain(drawn.settings), drawn.masks)
    return measure(train_on_mesh(drawn), alone)


# Parameters are below 1, and each step rounds them once.
SPACING = STEPS * 2.0**-24
# A gradient that is this part of its leaf's largest is rounding.
ROUNDING = 1e-6
# Of 142 compositions the largest were 6.9e-6 (a balance loss), 5.9e-5 (a learned scalar, whose
# gradient is a sum over all tokens) and 4.3e-4 (benchmarks/compositions.json). A leaf can be small,
# and one entry of it can turn where an optimiser takes signs.
METRICS = 2e-5
GRADIENTS = 2e-4
UPDATES = 0.02


def find_faults(apart: Differences) -> list[str]:
    """A line for each difference beyond rounding; a NaN is one."""
    lines = []
    for kind, limit in (("metrics", METRICS), ("gradients", GRADIENTS), ("updates", UPDATES)):
        parts = getattr(apart, kind)
        lines += [f"{kind} of {name}: {x:.1e}" for name, x in parts.items() if not x <= limit]
    return lines
