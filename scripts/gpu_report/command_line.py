"""The command line: the parts, in order, and how a process becomes one of them."""

import argparse
import importlib
import os
import signal
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from gpu_report import machine
from gpu_report.recorder import Recorder
from gpu_report.runner import Part, run_parts

# The limit for all parts together; and by what it is multiplied in a rehearsal, since a CPU may have few and busy cores.
SECONDS, REHEARSAL = 480, 4
FOLDER = Path(__file__).resolve().parent
# Name of the module in parts/, title, limit in seconds, share of the card's memory for JAX. The most valuable comes first.
# Time that a part does not need goes to those after it.
PARTS = (
    ("card", "Card", 35, 0.75),
    ("rates", "Rates of reductions and gathers", 20, 0.75),
    # It takes little memory, since all of it is filled with NaN before each check.
    ("correctness", "Kernels against float64", 45, 0.1),
    # It leaves memory to other libraries.
    ("operations", "Operations beside their peers", 60, 0.4),
    ("inference", "Inference at full size", 80, 0.9),
    ("attention", "Attention beside its peers", 15, 0.4),
    ("selection", "Matching and suppression beside the host's loops", 25, 0.4),
    ("training", "Training step of 4 views", 120, 0.9),
    ("sweep", "Launch settings of the kernels", 30, 0.75),
    ("inference_float32", "Inference at full size in float32", 50, 0.9),
)


def make_parts(rehearse: bool, only: list[str] | None = None) -> list[Part]:
    """The parts as processes of this program."""
    base = [sys.executable, str(FOLDER), *(["--rehearse"] if rehearse else []), "--part"]
    return [
        Part(name, title, seconds * (REHEARSAL if rehearse else 1), (*base, name), environment(rehearse, share))
        for name, title, seconds, share in PARTS
        if only is None or name in only
    ]


def programs_folder() -> Path:
    """Where compiled programs are kept."""
    return Path(tempfile.gettempdir(), f"gpu_report_programs_{os.getuid()}")


def environment(rehearse: bool, memory_share: float) -> dict[str, str]:
    """Environment variables of a part's process. Compiled programs are kept on disk, so that other parts and later calls can
    read them."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": str(programs_folder()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(memory_share),
        # Where JAX finds no GPU, a part fails at once.
        "JAX_PLATFORMS": "cpu" if rehearse else "cuda,cpu",
    }
    if rehearse:
        # Compiling takes longer than running.
        flags = ["--xla_backend_optimization_level=0"]
        if version("jax").startswith("0.10."):
            # Later versions do not know this flag, and end the process.
            flags.append("--xla_cpu_use_fusion_emitters=false")
        settings["XLA_FLAGS"] = " ".join(flags)
    return settings


def main(description: str) -> int:
    """Runs all parts, or is one of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_report"), help="folder for the report (default: gpu_report)"
    )
    parser.add_argument("--seconds", type=float, help=f"for all parts together (default: {SECONDS})")
    parser.add_argument("--only", help=f"some of the parts: {','.join(name for name, *_ in PARTS)}")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        return run_part(*arguments.part, small=arguments.rehearse)
    only = arguments.only.split(",") if arguments.only else None
    unknown = set(only or ()) - {name for name, *_ in PARTS}
    if unknown:
        parser.error(f"there are no parts {', '.join(sorted(unknown))}")
    # An exception, unlike a signal, also ends the part in progress.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = arguments.seconds or SECONDS * (REHEARSAL if arguments.rehearse else 1)
    parts, facts = make_parts(arguments.rehearse, only), machine.describe(FOLDER.parent.parent)
    kept = len(list(programs_folder().glob("*-cache")))
    if kept:
        facts["programs compiled before"] = f"{kept}, whose compile times are those of reading them"
    found = run_parts(parts, arguments.output, seconds, facts, rehearsal=arguments.rehearse)
    print((arguments.output / "report.md").read_text())
    return 0 if all(part["status"] == "done" for part in found["parts"]) else 1


def run_part(name: str, records: str, output: str, *, small: bool) -> int:
    """This process is a part."""
    module = importlib.import_module(f"gpu_report.parts.{name}")
    module.run(Recorder(Path(records), Path(output)), small)
    return 0
