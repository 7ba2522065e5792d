"""Compiles several programs side by side: the compiler uses few of a machine's cores for one."""

import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

# Programs compiled at a time.
THREADS = 8


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      call: runs the program on arrays of the shapes that it was compiled for.
      trace_seconds, compile_seconds: what it took, while other programs were compiled. Compiling is short where the
        program was on disk already.
    """

    call: Any
    trace_seconds: float
    compile_seconds: float

    @property
    def gigabytes(self) -> dict[str, float | None]:
        """Memory that the compiler plans for arguments, results and inner values."""
        memory = self.call.memory_analysis()
        sizes = {"arguments": "argument", "results": "output", "inner values": "temp"}
        return {name: memory and getattr(memory, f"{key}_size_in_bytes") / 1e9 for name, key in sizes.items()}


class Compiler:
    """A context in which programs are compiled by threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS)

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def start(self, function: Any, *arguments: Any) -> tuple[Future[Program], Any]:
        """Traces a jitted function now, and compiles it in a thread.

        Args:
          function, arguments: the function, and arrays or shapes for it.

        Returns:
          The program, when it is compiled, and the shapes of its results.
        """
        begin = time.perf_counter()
        traced = function.trace(*arguments)
        lowered = traced.lower()
        traced_for = time.perf_counter() - begin

        def finish() -> Program:
            begin = time.perf_counter()
            return Program(lowered.compile(), traced_for, time.perf_counter() - begin)

        return self._pool.submit(finish), traced.out_info


def compile_all(functions: Mapping[Any, tuple[Any, tuple[Any, ...]]]) -> dict[Any, Program]:
    """The programs of jitted functions, each given with its arguments."""
    with Compiler() as compiler:
        started = {name: compiler.start(function, *inputs)[0] for name, (function, inputs) in functions.items()}
        return {name: program.result() for name, program in started.items()}


def compile_what_can_be(
    functions: Mapping[Any, tuple[Any, tuple[Any, ...]]],
) -> tuple[dict[Any, Program], dict[Any, str]]:
    """As `compile_all`, but for functions that may fail to compile: the programs of the others, and the errors of these."""
    programs: dict[Any, Program] = {}
    failures: dict[Any, str] = {}
    started: dict[Any, Future[Program]] = {}
    with Compiler() as compiler:
        for name, (function, inputs) in functions.items():
            try:
                started[name] = compiler.start(function, *inputs)[0]
            except Exception as error:
                failures[name] = in_a_line(error)
        for name, program in started.items():
            try:
                programs[name] = program.result()
            except Exception as error:
                failures[name] = in_a_line(error)
    return programs, failures


def in_a_line(error: Exception) -> str:
    """The kind of an error, and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"
