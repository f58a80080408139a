"""What kind of work an instruction of a program does: matmuls, copies, or entry by entry."""

from gpt_jax.plan.program.text import Computations, Instruction, list_called

MATMULS = frozenset(("dot", "convolution"))
# Opcodes that compute nothing from the entries of their operands.
MOVES = frozenset(
    (
        "bitcast",
        "broadcast",
        "concatenate",
        "constant",
        "copy",
        "copy-done",
        "copy-start",
        "custom-call",
        "dynamic-slice",
        "dynamic-update-slice",
        "get-tuple-element",
        "iota",
        "pad",
        "parameter",
        "reshape",
        "reverse",
        "slice",
        "transpose",
        "tuple",
    )
)
KINDS = ("matmuls", "copies", "elementwise")


def find_work(line: Instruction, computations: Computations) -> str:
    """Returns the kind of KINDS that `line` is, with all that it calls.

    One matmul makes a whole fusion count as one, because the compiler gives a fusion one number.
    """
    opcodes = _list_opcodes(line, computations)
    if opcodes & MATMULS:
        return "matmuls"
    return "copies" if opcodes <= MOVES else "elementwise"


def _list_opcodes(line: Instruction, computations: Computations) -> set[str]:
    if line.opcode != "fusion":
        return {line.opcode}

    opcodes = set()
    for names in list_called(line).values():
        for name in names:
            for inner in computations.get(name, ()):
                opcodes |= _list_opcodes(inner, computations)
    return opcodes
