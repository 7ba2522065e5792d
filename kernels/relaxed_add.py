"""Addition into global memory that is atomic, but in no particular order.

Pallas's own `atomic_add` has acquire-release semantics: a memory barrier and an invalidation of the L1 cache around every
instruction. Sums of gradients need neither. With relaxed semantics the compiler emits plain reductions (`red.add`), four
numbers wide from compute capability 9.0 on. Pallas has no public way to ask for them, so `relaxed_add` is a primitive of its
own, which lowers as `atomic_add` does and then changes the semantics of the operation. No other file here uses private parts
of JAX.

Interpreted, it takes masks, and several additions to one place all count.
"""

import jax
import jax.numpy as jnp
from jax._src.pallas import primitives as pallas_primitives
from jax._src.pallas.triton import lowering as triton_lowering
from jax._src.pallas.triton import primitives as triton_primitives
from jax._src.state import discharge
from jax._src.state import primitives as state_primitives
from jax.extend.core import Primitive
from jaxlib.mlir import ir

# The code of relaxed semantics in Triton's enumeration MemSemantic, as the operation tt.atomic_rmw takes it.
RELAXED = 1

relaxed_add_p = Primitive("relaxed_add")


def relaxed_add(ref, index: tuple[jax.Array, ...], value: jax.Array, mask: jax.Array) -> None:
    """`ref[index] += value` where `mask`.

    Args:
      ref: the reference of an array in global memory.
      index: one array per axis of `ref`; together they broadcast to the shape of `value`.
      value: what is added.
      mask: bool, broadcasts to the shape of `value`.
    """
    ref, transforms = state_primitives.get_ref_and_transforms(ref, index, "relaxed_add")
    # A mask of another shape would lower to Triton code that does not parse.
    mask = jnp.broadcast_to(mask, value.shape)
    flat, tree = jax.tree.flatten((ref, transforms, value, mask))
    relaxed_add_p.bind(*flat, args_tree=tree)


@relaxed_add_p.def_effectful_abstract_eval
def _abstract_eval(*avals, args_tree):
    return pallas_primitives._swap_abstract_eval(*avals, args_tree=args_tree)


@discharge.register_discharge_rule(relaxed_add_p)
def _interpret(*args, args_tree):
    # JAX versions differ in what they pass in front of the operands.
    operands = args[-args_tree.num_leaves :]
    ref, (indexer,), value, mask = args_tree.unflatten(operands)
    old = ref[indexer.indices]
    new = ref.at[indexer.indices].add(jnp.where(mask, value, 0))
    return (new,) + (None,) * (len(operands) - 1), old


@triton_lowering.register_lowering(relaxed_add_p)
def _lower(ctx, *args, args_tree):
    add = triton_primitives.AtomicOpType.ADD
    old = triton_primitives._atomic_lowering_rule(ctx, *args, args_tree=args_tree, atomic_type=add)
    operation = old.owner
    if operation.name != "tt.atomic_rmw" or "sem" not in operation.attributes:
        raise RuntimeError(f"JAX {jax.__version__} lowers atomic_add to {operation.name}, which relaxed_add does not know.")
    operation.attributes["sem"] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), RELAXED)
    return old
