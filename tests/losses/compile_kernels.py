"""Compiles every kernel of the launcher's table for compute capability 9.0, without a device; a line of JSON each.

A program of its own, since Triton decides once in a process whether kernels are compiled or interpreted.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from triscale.losses import kernels, launch

FLAGS = {
    "softmax_statistics": {"WITHOUT_SELF": False, "BY_COLUMN": True},
    "softmax_weights": {"WITHOUT_SELF": False},
    "sigmoid_weights": {"WEIGHTS": True},
}
OPERANDS = {"16": "bf16", "tf32": "fp32", "float32": "fp32", "scores": "bf16"}
WHOLE_NUMBERS = ("rows", "columns", "width", "diagonal")
NUMBERS = ("factor", "bias", "gain")


def compiled(name: str, kind: str, blocks: launch.Blocks) -> Any:
    """What Triton makes of a kernel of the table."""
    kernel = getattr(kernels, name)
    constants = {
        **FLAGS[name],
        "FROM_SCORES": kind == "scores",
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_COLUMNS": blocks.columns,
        "BLOCK_WIDTH": blocks.width,
        "EVEN_WIDTH": True,
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "GROUP": launch.GROUP,
    }
    kinds = dict.fromkeys(constants, "constexpr") | dict.fromkeys(WHOLE_NUMBERS, "i32") | dict.fromkeys(NUMBERS, "fp32")
    kinds |= dict.fromkeys(("x", "y", "weights"), f"*{OPERANDS[kind]}")
    signature = {argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names}
    place = {argument: (number,) for number, argument in enumerate(signature)}
    aligned = [n for n, kind in signature.items() if kind.startswith("*") or n in ("rows", "columns", "width")]
    source = ASTSource(
        kernel,
        signature,
        {place[constant]: value for constant, value in constants.items()},
        {place[argument]: [["tt.divisibility", 16]] for argument in aligned},
    )
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def spilled_bytes(ptx: str) -> int:
    """What the assembler that comes with Triton spills of a thread's registers."""
    programs = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in ("ptxas", "ptxas-blackwell"):  # which of them knows the code is a matter of Triton's version
            command = [str(programs / assembler), "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return int(done.stderr.split(" bytes spill stores")[0].split()[-1])
    raise RuntimeError(done.stderr)


for (name, kind), blocks in launch.TABLE.items():
    made = compiled(name, kind, blocks)
    figures = {"spilled": spilled_bytes(made.asm["ptx"]), "shared": made.metadata.shared}
    print(json.dumps({"kernel": name, "kind": kind, **figures, "wgmma": made.asm["ptx"].count("wgmma.mma_async")}))
