"""What a program does on a GPU, read from the text of its optimised HLO: launches, bytes of device memory, products.

Each launch reads its operands from device memory and writes its results there, once; caches are ignored. Of a larger array
only the slices that are read or written count, and workspaces of libraries count as nothing. Loops count as often as they
run, and of a conditional the branch that moves the most. Kernels move what they tell themselves, see `kernel_costs`.
"""

import dataclasses
import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

from hpr_jax.analysis.flops import KernelCall, KernelCost
from hpr_jax.analysis.scopes import scope_of

Key = TypeVar("Key")

# How often a loop counts whose number of rounds depends on data.
UNKNOWN_ROUNDS = 3

# Operations that start no kernel.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Operations inside a fusion that only pass on what they read, in another place, shape or type.
_PASSING = {"bitcast", "copy", "reshape", "transpose"}
# Operations that read a part of their first operand.
_SLICES = {"dynamic-slice", "gather", "slice"}
# Operations that change a part of their first operand in place, and the operand that tells with what.
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
# Operations of a fusion that computes nothing, but converts or moves.
_MOVES = _PASSING | _SLICES | {"broadcast", "concatenate", "constant", "convert", "iota", "pad", "parameter", "tuple"}
# Operations that name a fusion if it has one of them, the weightiest first.
_NAMING = ("convolution", "dot", "sort", "scatter", "reduce-window", "reduce")

_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+[a-z0-9]*)\[([\d,]*)\]")
_WORKSPACE = re.compile(r", [su]8\[\d+\](\{[^}]*\})?\)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")


@dataclasses.dataclass(frozen=True)
class Launch:
    """What one instruction of a program starts.

    Attributes:
      name: of the instruction.
      kind: `product`, `convolution`, `kernel NAME`, `pad`, `bf16 to f32` and other conversions, `copy`, `reduce`, ...
      times: how often it starts in a run of the program.
      bytes: that it moves each time.
      flops: twice the multiply-adds of its products, each time.
      types: of its products, like ("bf16", "bf16", "f32") for operands and result. Operands of `tf32` are float32 numbers
        that are multiplied with 10 bits of precision.
      result: the type of its result.
      path: what the program says where it comes from: scopes, transformations and the operation.
    """

    name: str
    kind: str
    times: int
    bytes: int
    flops: int
    types: tuple[str, ...]
    result: str
    path: str

    @property
    def is_again(self) -> bool:
        """Whether it computes something of the forward pass again."""
        return "rematted_computation" in self.path

    def scope(self, names: Collection[str]) -> tuple[str, ...]:
        """The scopes that it comes from, of those with these names."""
        return scope_of(self.path, names)


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """All launches of a program.

    Attributes:
      launches: one for each instruction.
      guessed: how many loops counted as `UNKNOWN_ROUNDS` rounds.
    """

    launches: tuple[Launch, ...]
    guessed: int = 0

    @property
    def num_launches(self) -> int:
        return sum(launch.times for launch in self.launches)

    @property
    def bytes(self) -> int:
        return sum(launch.times * launch.bytes for launch in self.launches)

    @property
    def flops(self) -> dict[tuple[str, ...], int]:
        """FLOPs of products by their types, most first."""
        counted: Counter[tuple[str, ...]] = Counter()
        for launch in self.launches:
            if launch.flops:
                counted[launch.types] += launch.times * launch.flops
        return dict(counted.most_common())

    def grouped(self, key: Callable[[Launch], Key]) -> dict[Key, "CompiledProgram"]:
        """The launches by a key of theirs, those that move the most bytes first."""
        groups: dict[Key, list[Launch]] = defaultdict(list)
        for launch in self.launches:
            groups[key(launch)].append(launch)
        programs = [(key, CompiledProgram(tuple(launches))) for key, launches in groups.items()]
        return dict(sorted(programs, key=lambda item: -item[1].bytes))


def read_program(text: str, kernels: Mapping[KernelCall, KernelCost] | None = None) -> CompiledProgram:
    """Reads a program.

    Args:
      text: of `jax.stages.Compiled.as_text()`.
      kernels: what the program's kernels cost; others count as their operands and results.
    """
    return _Reader(text, kernels or {}).read()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """A line of a computation: `name = type operation(operands), attributes`."""

    name: str
    is_root: bool
    type: str
    operation: str
    operands: tuple[str, ...]
    rest: str

    def attribute(self, pattern: str) -> str | None:
        """What the first group of a pattern finds behind the type."""
        found = re.search(pattern, self.rest)
        return found and found.group(1)

    @property
    def path(self) -> str:
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        return self.attribute(r'custom_call_target="([^"]+)"') or ""

    @property
    def called(self) -> str:
        return self.attribute(r"(?:calls|to_apply|body)=%([\w.\-]+)") or ""


class _Computation:
    """The instructions of a computation, in order, by name."""

    def __init__(self) -> None:
        self.instructions: dict[str, _Instruction] = {}

    def __iter__(self):
        return iter(self.instructions.values())

    def type_of(self, name: str) -> str:
        """The type of an instruction, without the workspace of a library."""
        return _WORKSPACE.sub(")", self.instructions[name].type) if name in self.instructions else ""

    @functools.cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        """The instructions that read each instruction."""
        found = defaultdict(list)
        for instruction in self:
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found

    @functools.cached_property
    def root(self) -> _Instruction:
        return next(instruction for instruction in self if instruction.is_root)

    def path_of(self, instruction: _Instruction) -> str:
        """Where an instruction comes from. What XLA has put in says nothing: it belongs to what reads it, or to what it
        reads."""
        read = [self.instructions[operand] for operand in instruction.operands if operand in self.instructions]
        near = [*self.users[instruction.name], *read]
        return instruction.path or next((other.path for other in near if "/" in other.path), "")

    def results(self) -> list[_Instruction]:
        """What a fusion with this body computes."""
        if self.root.operation != "tuple":
            return [self.root]
        return [self.instructions[operand] for operand in self.root.operands]

    def behind(self, instruction: _Instruction, passing: Collection[str] = ("bitcast", "copy", "reshape")) -> _Instruction:
        """The instruction that computes what another one passes on."""
        while instruction.operation in passing and instruction.operands[0] in self.instructions:
            instruction = self.instructions[instruction.operands[0]]
        return instruction


class _Reader:
    def __init__(self, text: str, kernels: Mapping[KernelCall, KernelCost]):
        self.computations: dict[str, _Computation] = {}
        self.kernels, self.guessed = kernels, 0
        current = None
        for line in text.splitlines():
            head = None if line.startswith(" ") else _COMPUTATION.match(line)
            if head:
                current = self.computations[head.group(2)] = _Computation()
                if head.group(1):
                    self.entry = head.group(2)
            elif current is not None and (parsed := _parse(line)):
                current.instructions[parsed.name] = parsed

    def read(self) -> CompiledProgram:
        launches = tuple(self._launches(self.entry, 1))
        return CompiledProgram(launches, self.guessed)

    def _launches(self, name: str, times: int) -> list[Launch]:
        """The launches of a computation that runs so often."""
        computation, found = self.computations[name], []
        for instruction in computation:
            operation = instruction.operation
            if operation == "while":
                rounds = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"')
                self.guessed += rounds is None
                found += self._launches(instruction.called, times * int(rounds or UNKNOWN_ROUNDS))
            elif operation == "call" or operation == "async-start":
                found += self._launches(instruction.called, times)
            elif operation == "conditional":
                listed = instruction.attribute(r"branch_computations=\{([^}]*)\}") or instruction.rest
                pattern = r"%([\w.\-]+)" if listed is not instruction.rest else r"(?:true|false)_computation=%([\w.\-]+)"
                branches = [self._launches(branch, times) for branch in re.findall(pattern, listed)]
                found += max(branches, key=lambda launches: sum(one.times * one.bytes for one in launches))
            elif operation not in _FREE and not operation.endswith("-done"):
                found.append(self._launch(computation, instruction, times))
        return found

    def _launch(self, computation: _Computation, instruction: _Instruction, times: int) -> Launch:
        body = self.computations.get(instruction.called) if instruction.operation == "fusion" else None
        path = computation.path_of(instruction)
        if body is not None:
            moved = _moved_by_fusion(body, [computation.type_of(operand) for operand in instruction.operands])
            paths = [one.path for one in body if "/" in one.path]
            path = instruction.path or (paths[-1] if paths else path)
            flops, types = _products(body, list(body))
            kind = _kind_of_fusion(body)
        else:
            moved = _moved(computation, instruction)
            flops, types = _products(computation, [instruction])
            kind = _kind(instruction, path)
        if kind.startswith("kernel "):
            operands = tuple(_arrays(computation.type_of(operand))[0] for operand in instruction.operands)
            cost = self.kernels.get((kind.removeprefix("kernel "), operands))
            if cost is not None:
                moved, flops = cost.bytes, cost.flops
                types = (operands[0].partition("[")[0],) if flops else ()
        result = " ".join(_arrays(computation.type_of(instruction.name)))
        return Launch(instruction.name, kind, times, moved, flops, types, result, path)


def _parse(line: str) -> _Instruction | None:
    """The instruction of a line."""
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    root, name, rest = found.groups()
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].strip()
    operation, _, behind = rest.partition("(")
    operands = tuple(re.findall(r"%([\w.\-]+)", behind.split(")", 1)[0]))
    return _Instruction(name, bool(root), type_, operation, operands, rest)


def _closing(text: str) -> int:
    """Where the bracket at the start of a text is closed."""
    depth = 0
    for place, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return place
    raise ValueError(f"A bracket is not closed: {text[:80]}")


def _arrays(type_: str) -> list[str]:
    """The arrays of a type, like `f32[3,5]`."""
    return [f"{dtype}[{shape}]" for dtype, shape in _ARRAY.findall(type_)]


def _shape(type_: str) -> list[int]:
    """The shape of the first array of a type."""
    found = _ARRAY.search(type_)
    return [int(side) for side in found.group(2).split(",") if side] if found else []


def _count(sides: Iterable[int]) -> int:
    return functools.reduce(int.__mul__, sides, 1)


def _size(type_: str) -> int:
    """Bytes of all arrays of a type."""
    total = 0
    for dtype, shape in _ARRAY.findall(type_):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += -(-_count(int(side) for side in shape.split(",") if side) * bits // 8)
    return total


def _moved(computation: _Computation, instruction: _Instruction) -> int:
    """Bytes that an instruction reads and writes that is no fusion."""
    sizes = [_size(computation.type_of(operand)) for operand in instruction.operands]
    result = _size(computation.type_of(instruction.name))
    if instruction.operation in _SLICES:
        return 2 * result + sum(sizes[1:])
    if instruction.operation == "dynamic-update-slice":
        return 2 * sizes[1] + sum(sizes[2:])
    if instruction.operation == "iota":
        return result
    return sum(sizes) + result


def _moved_by_fusion(body: _Computation, operands: list[str]) -> int:
    """Bytes that a fusion reads and writes, given the types of its operands."""
    read, moved = _elements_read(body), 0
    for instruction in body:
        if instruction.operation == "parameter" and instruction.name in read:
            operand = operands[int(instruction.attribute(r"parameter\((\d+)") or 0)]
            elements = _count(_shape(operand))
            moved += _size(operand) * min(read[instruction.name], elements) // max(elements, 1)
    for result in body.results():
        changed = _changed_in_place(body, result)
        moved += _size(body.type_of(result.name if changed is None else changed.operands[_IN_PLACE[changed.operation]]))
    return moved


def _changed_in_place(body: _Computation, result: _Instruction) -> _Instruction | None:
    """What changes a part of an operand of the fusion, if that is what a result is."""
    computed = body.behind(result)
    if computed.operation not in _IN_PLACE:
        return None
    return computed if body.behind(body.instructions[computed.operands[0]]).operation == "parameter" else None


def _elements_read(body: _Computation) -> Counter[str]:
    """How many elements of each instruction a fusion computes, or reads if it is a parameter, at most: it computes what its
    results depend on."""
    wanted: Counter[str] = Counter()
    for result in body.results():
        changed = _changed_in_place(body, result)
        if changed is None:
            wanted[result.name] += _count(_shape(result.type))
            continue
        for operand in changed.operands[1:]:
            wanted[operand] += _count(_shape(body.type_of(operand)))
        if changed.operation == "scatter":
            # What is changed is read, too.
            wanted[changed.operands[0]] += _count(_shape(body.type_of(changed.operands[2])))
    for instruction in reversed(list(body)):
        size = _count(_shape(instruction.type))
        count = min(wanted[instruction.name], size)
        if not count or instruction.operation in ("parameter", "tuple"):
            continue
        for place, operand in enumerate(instruction.operands):
            whole = _count(_shape(body.type_of(operand)))
            if instruction.operation in _SLICES:
                wanted[operand] += count if place == 0 else whole
            elif whole > size or instruction.operation == "concatenate":
                # All that a part of the results is made of: of a sum, the same part.
                wanted[operand] += -(-whole * count // size)
            else:
                wanted[operand] += min(count, whole)
    return wanted


def _kind(instruction: _Instruction, path: str) -> str:
    """The kind of launch of an instruction that is no fusion."""
    target = instruction.target
    if "matmul" in target or "gemm" in target:
        return "product"
    if target.startswith("__cudnn$conv"):
        return "convolution"
    if "triton" in target:
        return f"kernel {_kernel_name(path)}"
    return target or instruction.operation


def _kernel_name(path: str) -> str:
    """The name of a kernel, which stands in front of the operation that calls it."""
    return path.removesuffix("/pallas_call").rpartition("/")[2]


def _kind_of_fusion(body: _Computation) -> str:
    """The kind of launch of a fusion: what it has beside operations on single elements, or how it moves arrays."""
    operations = {instruction.operation for instruction in body}
    for operation in _NAMING:
        if operation in operations:
            return "product" if operation == "dot" else operation
    results = [body.behind(result, (*_PASSING, "convert")) for result in body.results()]
    if any(result.operation == "pad" for result in results):
        return "pad"
    if any(body.behind(result).operation == "dynamic-update-slice" for result in body.results()):
        return "dynamic-update-slice"
    if operations - _MOVES:
        return "elements"
    types = [_ARRAY.findall(instruction.type) for instruction in body if instruction.operation == "parameter"]
    read = {found[0][0] for found in types if found and found[0][1]}
    written = {_ARRAY.findall(result.type)[0][0] for result in body.results()}
    for before, after in (("bf16", "f32"), ("f32", "bf16")):
        if before in read and after in written and "convert" in operations:
            return f"{before} to {after}"
    return "copy"


def _products(computation: _Computation, instructions: list[_Instruction]) -> tuple[int, tuple[str, ...]]:
    """FLOPs of the products among some instructions of a computation, and the types of the largest one."""
    found = [
        (_flops(computation, instruction), _types(computation, instruction))
        for instruction in instructions
        if instruction.operation in ("dot", "convolution") or "matmul" in instruction.target or "conv" in instruction.target
    ]
    return sum(flops for flops, _ in found), max(found, default=(0, ()))[1]


def _types(computation: _Computation, instruction: _Instruction) -> tuple[str, ...]:
    """The types of a product's operands and result."""
    highest = "HIGHEST" in instruction.rest or "highest" in instruction.rest
    names = [
        _ARRAY.findall(computation.type_of(name) or "f32[]")[0][0] for name in (*instruction.operands[:2], instruction.name)
    ]
    return tuple("tf32" if name == "f32" and place < 2 and not highest else name for place, name in enumerate(names))


def _flops(computation: _Computation, instruction: _Instruction) -> int:
    """Twice the multiply-adds of a product or convolution."""
    shapes = [_shape(computation.type_of(name)) for name in (*instruction.operands[:2], instruction.name)]
    left, right, result = shapes
    labels = instruction.attribute(r"dim_labels=([\w?]+_[\w?]+)->")
    if labels is None:
        axes = instruction.attribute(r'lhs_contracting_dimensions(?:":\[|=\{)([^\]}]*)') or ""
        return 2 * _count(result) * _count(left[int(axis)] for axis in re.findall(r"\d+", axes))
    # Gradients of a convolution have the places of its result and of its kernel exchanged.
    output, kernel = result, right
    if "BackwardInput" in instruction.target:
        output = left
    if "BackwardFilter" in instruction.target:
        output, kernel = right, result
    channels = kernel[labels.partition("_")[2].index("o")]
    return 2 * _count(output) * _count(kernel) // channels
