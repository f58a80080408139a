"""Machines by name: their sizes, and what is said of names that are none."""

import pytest

from gpt_jax.errors import UsageError
from gpt_jax.hardware import chips
from gpt_jax.plan import targets
from gpt_jax.plan.topology import PODS, join_sizes, parse_topology


@pytest.mark.parametrize(
    "text, count, hosts",
    [
        ("v5p:4x4x4", 64, 16),
        ("v5e:16x16", 256, 64),
        ("TPU7x:4x4x4", 128, 16),
        ("tpu7x:2x2x1", 8, 1),
        ("h100:8", 8, 1),
        ("H200:64", 64, 8),
        ("b200:4", 4, 1),
    ],
)
def test_machines_by_name(text, count, hosts):
    topology = parse_topology(text)
    assert (topology.devices, topology.hosts) == (count, hosts)
    assert topology.peak == chips.peak_flops(topology.chip.kind)


@pytest.mark.parametrize(
    "text, slices, words",
    [
        ("a100:8", 1, "unknown hardware 'a100'; known are v4:NxNxN"),
        ("v5p:4x4", 1, "expected v5p:NxNxN"),
        ("h100:12", 1, "do not fill hosts of 8; take h100:8 or h100:16"),
        ("v5e:0x4", 1, "expected v5e:NxN, as in v5e:4x4"),
        ("h100:64", 2, r"GPUs have none; .* as in h100:128"),
        ("v5p:2x2x1", 0, "--slices=0"),
        ("v5p:100000x100000x4", 1, "than a pod of 8,960; as in v5p:16x20x28"),
        ("v5e:17x17", 1, "289 chips are more than a pod of 256; as in v5e:16x16"),
        ("v6e:3x17", 1, r"1x1, 2x2, 2x4, .*, 16x16; as in v6e:4x8"),
        ("v6e:16x1", 1, "as in v6e:4x4"),
        ("v5e:2x16", 1, "as in v5e:4x8"),
        ("v5p:4x4x5", 1, r"2x2x1, .* multiples of 4 up to 16x20x28; as in v5p:4x4x4"),
        ("v5p:64x4x4", 1, "as in v5p:8x8x16"),
        ("v4:1x1x1", 1, "as in v4:2x2x1"),
        ("v5p:1x1x28", 1, "as in v5p:2x2x4"),
        ("h100:65544", 1, "more than 65,536 GPUs"),
        ("h100:1000000", 1, "more than 65,536 GPUs"),
        ("v5p:2x2x1", 1025, "--slices=1025: expected 1 to 1024"),
    ],
)
def test_machines_that_are_none(text, slices, words):
    with pytest.raises(UsageError, match=words):
        parse_topology(text, slices)


def test_a_whole_pod_is_a_machine():
    for name, shape in PODS.items():
        assert parse_topology(f"{name}:{join_sizes(shape)}").shape == shape
    assert {*PODS} == {name for name, chip in chips.CHIPS.items() if chip.platform == "tpu"}


def test_every_chip_has_a_peak_and_its_clock_gives_it():
    """The peak is 2 x entries of the matrix units x clock."""
    entries_of = {
        "v4": 8 * 128**2,
        "v5e": 4 * 128**2,
        "v5p": 8 * 128**2,
        "v6e": 4 * 256**2,
        "TPU7x": 4 * 256**2,
    }

    for name, chip in chips.CHIPS.items():
        peak = chips.peak_flops(chip.kind)
        assert peak, name
        if chip.clock:
            assert 2 * entries_of[name] * chip.clock == pytest.approx(peak, rel=2e-3), name


def test_cards_are_described_by_the_table_of_chips():
    cards = {name for name, chip in chips.CHIPS.items() if chip.platform == "gpu"}
    assert {*targets.CARDS} == cards
    for name in cards:
        chip = chips.CHIPS[name]
        text = targets.describe_card(name)
        assert f"device_memory_size: {chip.shown}\n" in text
        assert f'"{chip.kind}"' in text
        assert chip.memory == int(0.9 * chip.shown)
