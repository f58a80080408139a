"""FLOPs and MFU equal published numbers, and a CPU's peak is measured."""

import itertools
from types import SimpleNamespace

import jax
import pytest

from gpt_jax.hardware import chips
from gpt_jax.hardware.flops import flops_per_token, mfu, mfu_metrics

LLAMA_8B = dict(
    matmul_params=int(8.03e9 - 0.525e9), windows=[0] * 32, attention_width=4096, seq_len=8192
)


def test_nanochat_d24_flops_and_mfu():
    # Three short windows, then a long one, tiled over the depth; the last one is long.
    windows = [2048 if layer % 4 == 3 else 1024 for layer in range(24)]
    matmul_params = 12 * 24 * 1536**2 + 32768 * 1536 + 12 * 32 * 12
    flops = flops_per_token(matmul_params, windows, 1536, 2048)
    assert flops == 4_945_112_064

    tokens = 16_704 * 524_288
    assert flops * tokens == pytest.approx(4.330784131e19, rel=1e-9)
    peak = 8 * chips.peak_flops("NVIDIA H100 80GB HBM3")
    assert round(100 * mfu(flops, tokens / 10_949.467, peak), 2) == 49.99


@pytest.mark.parametrize("tokens_per_second, percent", [(5_762, 33.7), (6_667, 39.0)])
def test_torchtitan_llama_8b_mfu(tokens_per_second, percent):
    flops = flops_per_token(**LLAMA_8B)
    assert round(100 * mfu(flops, tokens_per_second, 989e12), 1) == percent


def test_megatron_llama_8b_flops():
    assert round(13_812 * flops_per_token(**LLAMA_8B) / 1e12, 1) == 799.9


def test_windows_cap_at_the_row_and_causal_counts_the_keys_that_a_token_sees():
    T = 1600
    args = dict(windows=[0, 40, 6400], attention_width=8, seq_len=T)
    assert flops_per_token(100, **args) == 600 + 12 * 8 * (T + 40 + T)

    counted = sum(min(t + 1, reach) for reach in (T, 40, T) for t in range(T)) / T
    causal = flops_per_token(100, **args, causal=True)
    assert causal == pytest.approx(600 + 12 * 8 * counted, rel=1e-3)
    assert flops_per_token(100, [0], 8, T, causal=True) == 600 + 12 * 8 * T // 2


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("TPU7x", 1153.5e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_devices(kind, peak):
    assert chips.peak_flops(kind) == peak


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "",
        "TPU v9",
        "TPU v4 lite",
        "NVIDIA H20",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD Instinct MI300A",
        "NVIDIA A100X",
    ],
)
def test_unknown_devices_have_no_peak(kind):
    assert chips.peak_flops(kind) is None


def test_unknown_accelerator_says_so_and_reports_no_mfu():
    device = SimpleNamespace(device_kind="Foo 9", platform="gpu", process_index=0)
    peak = chips.find_peak([device])
    assert peak.flops is None
    assert "'Foo 9'" in peak.line and "MFU is not reported" in peak.line
    assert mfu_metrics(1.0, 1.0, 1.0, peak.flops) == {}


def test_peak_counts_accelerators_but_processes_on_cpu():
    def make_devices(kind, platform):
        return [
            SimpleNamespace(device_kind=kind, platform=platform, process_index=i // 4)
            for i in range(8)
        ]

    assert chips.find_peak(make_devices("TPU v4", "tpu")).flops == 8 * 275e12
    cpu = chips.find_peak(make_devices("cpu", "cpu"), measure=lambda: 5e10)
    assert cpu.flops == 2 * 5e10
    assert "50.0 GFLOP/s" in cpu.line and "2 processes" in cpu.line


def test_cpu_peak_is_flops_over_the_best_time():
    ticks = itertools.accumulate([0.0, 3.0, 0.0, 0.5, 0.0, 2.0])  # Repeats of 3 s, 0.5 s and 2 s.
    assert chips.measure_cpu_peak(size=8, repeats=3, now=lambda: next(ticks)) == 2 * 8**3 / 0.5
    assert chips.measure_cpu_peak(size=64, repeats=2) > 0


def test_cpu_peak_inside_a_mesh():
    with jax.set_mesh(jax.make_mesh((len(jax.devices()),), ("data",))):
        assert chips.measure_cpu_peak(size=16, repeats=1) > 0


def test_mfu_metrics_give_both_conventions():
    assert mfu_metrics(10.0, 5.0, 3.0, 60.0) == {
        "throughput/mfu_full": 0.5,
        "throughput/mfu_causal": 0.25,
    }


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 1979e12),
        ("NVIDIA H200", 1979e12),
        ("NVIDIA H100 PCIe", 1513e12),
        ("NVIDIA B200", 4500e12),
        ("TPU7x", 4614e12 / 2),
        ("NVIDIA A100-SXM4-80GB", None),
        ("AMD Instinct MI300X", None),
        ("TPU v5p", None),
        ("TPU v6 lite", None),
        ("cpu", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_fp8_peaks(kind, peak):
    assert chips.peak_fp8_flops(kind) == peak
    assert peak is None or peak == pytest.approx(2 * chips.peak_flops(kind), rel=1e-3)
