"""Compile every kernel for a card that need not be here, and say what it reads and writes at a time.

python tests/benchmarks/compiled.py [compute capability, 90]
"""

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from se_inject.kernels import programs

VALUES = {"value", "shortcut", "out", "grad", "other", "d_value", "d_shortcut"}
FLOATS = {"partial", "mean", "hidden", "d_mean", "gate", "logits", "w1", "w2", "b1", "b2"}
DIVISIBLE = {"sn", "sp", "sc", "C", "P", "length"}
LAST, FIRST = {"BP": 32, "BC": 64, "sc": 1}, {"BP": 1024, "BC": 2, "sp": 1}
"""Tiles and the stride that is 1, for channels last and first."""
GATE = {"GATE": "sigmoid", "ONE": True}


def compiled(kernel, capability=90, **constants):
    """A kernel for float16 values and constants, as assembly of the card."""
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        signature[name] = "*fp16" if name in VALUES else "*fp32" if name in FLOATS else "i32"
        if name in VALUES | FLOATS | DIVISIBLE:
            attributes[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(ASTSource(kernel, signature, values, attributes), target=target)


def described(kernel, capability, **constants):
    text = compiled(kernel, capability, **constants).asm["ptx"]
    moves = sorted(set(re.findall(r"\b(?:ld|st)\.global[.\w]*", text)))
    options = " ".join(str(value) for name, value in constants.items() if name in ("ACT", "GATE", "sc", "sp"))
    print(f"{kernel.__name__} {options}: {' '.join(moves)}")


def main():
    capability = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for layout in (LAST, FIRST):
        described(programs.squeeze, capability, **layout)
        described(programs.value_backward, capability, **layout, ADD=True, **GATE, ACT="none", EXACT=True)
    described(programs.bottleneck, capability, BIAS=True, BC=256)
    for activation in ("relu", "silu", "hardswish", "gelu", "none"):
        tail = {"ADD": True, **GATE, "ACT": activation, "EXACT": True}
        described(programs.tail, capability, **LAST, **tail)
        described(programs.tail_backward, capability, **LAST, **tail, STORE=True, SCALE=False)
    for gate in ("sigmoid", "hard_sigmoid", "tanh", "relu"):
        options = {"ADD": True, "GATE": gate, "ONE": True, "ACT": "relu", "EXACT": True}
        described(programs.tail_with_gate, capability, **LAST, INNER="relu", BIAS=True, BR=32, **options)
        described(programs.tail_backward, capability, **LAST, **options, STORE=True, SCALE=False)
    options = {"ADD": True, "GATE": "given", "ONE": False, "ACT": "relu", "EXACT": True}
    described(programs.tail, capability, **LAST, **options)
    described(programs.tail_backward, capability, **LAST, **options, STORE=True, SCALE=True)
    described(programs.bottleneck, capability, BIAS=False, BC=256, mean=None)
    options |= {"GATE": "tanh", "INNER": "silu", "BIAS": False, "BR": 32}
    described(programs.tail_with_gate, capability, **LAST, **options, logits=None)


if __name__ == "__main__":
    main()
