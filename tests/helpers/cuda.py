"""Lowering for CUDA and compiling Triton kernels on a machine without a GPU."""

import contextlib
import importlib.util
import re
import subprocess
import tempfile
from pathlib import Path

import jax

HAS_COMPILER = importlib.util.find_spec("triton") is not None


def _pretended_device():
    """JAX 0.11 and newer lower Pallas kernels for a device, which may be abstract; older ones do without."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
    except ImportError:
        return contextlib.nullcontext()
    try:
        device = AbstractDevice("NVIDIA H200", None, "cuda")
    except TypeError:
        return contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def triton_ir(function, *arguments) -> dict[str, str]:
    """Lowers a function for CUDA and parses the Triton code of each kernel in it: texts by name.

    Raises:
      MLIRError: code that Triton would not read.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir
    from jaxlib.triton import dialect

    with _pretended_device():
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    found = {}

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            settings = operation.attributes["mhlo.backend_config"]
            code = ir.StringAttr(settings["ir"]).value_bytes
            with mlir.make_ir_context() as context, ir.Location.unknown():
                dialect.register_dialect(context)
                name = ir.StringAttr(settings["name"]).value
                found[f"{name}{len(found)}"] = ir.Module.parse(code).operation.get_asm()
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return found


def compile_kernel(code: str, capability: int, num_warps: int) -> dict[str, object]:
    """Compiles Triton code with Triton's own compiler and assembler: registers, spilled bytes, and the PTX text."""
    import triton
    from triton.backends.compiler import GPUTarget

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ttir"
        path.write_text(code)
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        compiled = triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        (Path(folder) / "kernel.ptx").write_text(ptx)
        # Triton ships two assemblers; this is the newer one, which reads all it writes.
        assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
        suffix = "a" if capability >= 90 else ""
        command = [assembler, "-v", f"--gpu-name=sm_{capability}{suffix}", "kernel.ptx", "-o", "kernel.cubin"]
        log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return {"registers": registers, "spilled": spilled, "ptx": ptx}
