"""Lowers programs for CUDA, and compiles their Triton kernels, on a machine without a GPU."""

import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

from hpr_jax.kernels.abstract_gpu import abstract_gpu

# Whether Triton's compiler is installed.
HAS_COMPILER = importlib.util.find_spec("triton") is not None


def triton_ir(function, *arguments) -> dict[str, str]:
    """Lowers a function for CUDA, and parses the Triton code of each kernel in it.

    Args:
      arguments: of the function; they may be abstract.

    Returns:
      Triton code by the name of the kernel and a number.

    Raises:
      MLIRError: code that Triton would not read.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jaxlib.triton import dialect

    with abstract_gpu():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found: dict[str, str] = {}

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            settings = operation.attributes["mhlo.backend_config"]
            code = ir.StringAttr(settings["ir"]).value_bytes
            with mlir.make_ir_context() as context, ir.Location.unknown():
                dialect.register_dialect(context)
                name = ir.StringAttr(settings["name"]).value
                found[f"{name}{len(found)}"] = str(ir.Module.parse(code).operation.get_asm())
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


class Compiled(NamedTuple):
    """A compiled kernel: how many registers a thread takes, how many bytes are spilled from registers, and its PTX code."""

    registers: int
    spilled: int
    ptx: str


def compile_kernel(code: str, capability: int, num_warps: int) -> Compiled:
    """Compiles Triton code for a compute capability (times ten) with Triton's own compiler and assembler."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(code)
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        compiled = triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        (Path(folder) / "kernel.ptx").write_text(ptx)
        # Triton comes with two assemblers; this is the newer one, which reads whatever PTX the compiler writes.
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
        suffix = "a" if capability >= 90 else ""
        command = [str(assembler), "-v", f"--gpu-name=sm_{capability}{suffix}", "kernel.ptx", "-o", "kernel.cubin"]
        log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    (registers,) = re.findall(r"Used (\d+) registers", log)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return Compiled(int(registers), spilled, ptx)
