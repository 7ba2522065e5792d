"""The scopes of `jax.named_scope` in the names that JAX and XLA give to operations.

Modules compute in scopes with the names of their attributes, so that an operation tells the module that it is part of.
"""

import re
from collections.abc import Collection

from flax import nnx

# The names of scopes that are no modules: parts of a detector without parameters.
OTHERS = {"detections", "normalize", "regions", "selection"}
# A transformation around names: jvp(encoder/attention), transpose(jvp(heads)), vmap().
_TRANSFORMATION = re.compile(r"[\w<>.]+\(|\)")


def scope_of(path: str, names: Collection[str]) -> tuple[str, ...]:
    """The scopes in a name such as `jit(f)/transpose(jvp(encoder))/while/body/attention/dot_general`.

    Args:
      path: name of an operation of a compiled program, or name stack of an equation.
      names: known names of scopes; everything else is left out: functions, transformations, loops, and the operation.
    """
    # The names of functions in jit(...) may be those of scopes.
    without_functions = re.sub(r"\bjit\([^()]*\)", "", path)
    scopes = tuple(part for part in _TRANSFORMATION.sub("", without_functions).split("/") if part in names)
    # The scope of a rematerialised part is named twice in its backward pass: around it and inside.
    return scopes[len(scopes) - 1 - scopes[::-1].index(scopes[0]) :] if scopes else ()


def module_names(module: nnx.Module) -> set[str]:
    """The names of scopes inside a module: attributes that hold modules, numbers of modules in lists, and `OTHERS`."""
    modules = [path for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]
    return {str(part) for path in modules for part in path} | OTHERS
