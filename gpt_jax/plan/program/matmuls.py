"""FLOPs of the instructions that multiply matrices, whatever the compiler turned them into."""

import math
import re

import numpy as np

from gpt_jax.plan.program.text import Instruction, list_operands, read_dims

# Kernels of libtpu and megablox for experts' grouped matmuls, by the names of their calls. Those of
# GPUs have no names of their own, but those of model/experts/triton_matmuls.py in their metadata.
_GROUPED = re.compile(r"(ragged-dot-none|tgmm)\b")
_GROUPED_ON_GPU = re.compile(r'op_name="[^"]*\bexperts_(multiply|sum_products)\b')
_CUBLAS = re.compile(r'custom_call_target="__cublas')
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)[}\]]')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_WINDOW_FIELD = re.compile(r"\b(size|stride|pad|lhs_dilate)=([\dx_]+)")


def count_matmul_flops(line: Instruction, shapes: dict[str, str]) -> float:
    """Returns 2 x result x contracted of a dot, a call of cuBLAS, or a convolution that is one.

    Everything else has 0. libtpu writes matmuls as convolutions. `shapes` are the texts of types by
    instruction, because operands are named and not described.
    """
    is_cublas = line.opcode == "custom-call" and bool(_CUBLAS.search(line.rest))
    if line.opcode not in ("dot", "convolution") and not is_cublas:
        return 0.0

    operands = list_operands(line)
    if len(operands) < 2 or not all(name in shapes for name in operands):
        return 0.0
    left = read_dims(shapes[operands[0]])
    right = read_dims(shapes[operands[1]])

    if line.opcode == "convolution":
        return _count_convolution_flops(line, left, right)
    contracted = _CONTRACTED.search(line.rest)
    if not contracted:
        return 0.0  # cuBLAS solves triangles too.
    depth = math.prod(left[int(place)] for place in re.findall(r"\d+", contracted[1]))
    return 2.0 * math.prod(read_dims(line.result)) * depth


def _count_convolution_flops(line: Instruction, left: list[int], right: list[int]) -> float:
    labels = _LABELS.search(line.rest)
    if not labels:
        return 0.0
    window_text = _WINDOW.search(line.rest)
    window = dict(_WINDOW_FIELD.findall(window_text[1])) if window_text else {}
    result = read_dims(line.result)

    def read_field(name: str, spatial: int, default: str) -> str:
        return window[name].split("x")[spatial] if name in window else default

    taps = 1.0
    for spatial, digit in enumerate(sorted(filter(str.isdigit, labels[1]))):
        taps *= _count_taps(
            entries=left[labels[1].index(digit)],
            results=result[labels[3].index(digit)],
            size=int(read_field("size", spatial, "1")),
            stride=int(read_field("stride", spatial, "1")),
            low=int(read_field("pad", spatial, "0_0").split("_")[0]),
            dilation=int(read_field("lhs_dilate", spatial, "1")),
        )
    return 2.0 * math.prod(result) * right[labels[2].index("i")] * taps


def _count_taps(
    entries: int, results: int, size: int, stride: int, low: int, dilation: int
) -> float:
    """Returns how many of a window's `size` taps meet an entry, on average over the results.

    libtpu writes batch dims as spatial ones, dilated or padded so that one tap meets an entry.
    """
    place = np.arange(results)[:, None] * stride + np.arange(size) - low
    is_inside = (place >= 0) & (place <= (entries - 1) * dilation)
    is_entry = place % dilation == 0
    return (is_inside & is_entry).sum() / results


def count_grouped_flops(line: Instruction, shapes: dict[str, str]) -> float:
    """Returns the FLOPs of a grouped matmul of experts; everything else has 0.

    It multiplies rows [m, k] with kernels [groups, k, n] into [m, n], or rows [m, k] with rows
    [m, n] into [groups, k, n]. The first rows are the last operand but one.
    """
    is_grouped = _GROUPED.match(line.name) or _GROUPED_ON_GPU.search(line.rest)
    if line.opcode != "custom-call" or not is_grouped:
        return 0.0
    rows = read_dims(shapes[list_operands(line)[-2]])
    return 2.0 * math.prod(rows) * read_dims(line.result)[-1]
