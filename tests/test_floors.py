"""The house: wings import only wings below them, no two import one another, and what loads data knows no JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

PACKAGE = tiny.ROOT / "hpr_jax"
# From the top floor down. A folder of models or data is on the floor of its wing.
FLOORS = (
    "main",
    "commands",
    "analysis",
    "training",
    "evaluation",
    "serving",
    "inference",
    "weights",
    "models",
    "losses",
    "data",
    "runtime",
    "ops",
    "types",
    "kernels",
    "config",
    "settings",
    "errors",
)
# Wings that know nothing of one another although one is above the other.
APART = {("models", "losses"), ("models", "data"), ("losses", "data"), ("models", "config"), ("losses", "runtime")}
# What may import JAX below `data`: a config's sources, and the reading and writing of TFDS.
DATA_WITHOUT_JAX = [
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", ".")
    for path in sorted((PACKAGE / "data").rglob("*.py"))
    if path.name not in ("__init__.py", "build.py", "tfds.py", "tfds_writer.py")
]


def modules() -> dict[str, Path]:
    """Every module below the package by its dotted name without `hpr_jax.`; a package is its folder's name."""
    found = {}
    for folder in (PACKAGE, tiny.ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            # The package has kernels/ as a link, which is not followed.
            place = path.relative_to(PACKAGE if folder == PACKAGE else tiny.ROOT)
            if "configs" not in place.parts:
                found[".".join(place.with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hpr_jax":
            base = node.module.removeprefix("hpr_jax").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("hpr_jax.") for alias in node.names if alias.name.startswith("hpr_jax.")}
    return found


MODULES = modules()
IMPORTS = {name: imports(path) for name, path in MODULES.items() if name != "__init__"}


def wing(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_on_a_floor():
    assert {wing(name) for name in MODULES} - {"__init__"} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_imports_from_above(floor):
    height = {name: -place for place, name in enumerate(FLOORS)}
    for name, imported in IMPORTS.items():
        if wing(name) == floor:
            for other in imported:
                assert height[wing(other)] <= height[floor], f"{name} imports {other}, which is above it"
                assert (floor, wing(other)) not in APART, f"{name} imports {other}, of which {floor} shall know nothing"


def test_no_modules_import_one_another():
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in sorted(IMPORTS.get(name, ())):
                visit(other, (*above, name))
            done.add(name)

    for name in IMPORTS:
        visit(name, ())


def test_the_package_imports_no_config_file():
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert "configs" not in module.split("."), f"{name} imports {module}"


def imported_with(module: str) -> set[str]:
    """The top-level packages that a new process has imported after a module of this package."""
    code = f"import sys, {module}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tiny.ROOT)
    return set(done.stdout.split())


def test_the_command_line_and_what_loads_data_import_no_jax():
    names = ", ".join(f"hpr_jax.{name}" for name in ("main", "config", "settings", *DATA_WITHOUT_JAX))
    assert not imported_with(names) & {"jax", "flax", "optax", "orbax", "tensorflow_datasets"}


def test_commands_import_no_jax_before_they_run():
    names = ", ".join(f"hpr_jax.{name}" for name in MODULES if wing(name) == "commands")
    assert not imported_with(names) & {"jax", "flax"}
