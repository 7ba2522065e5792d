"""All loss terms in one call that can be compiled and differentiated together with a detector.

Training solves the matching between two compiled programs. Here one program calls the host in its midst.
"""

import jax
import jax.numpy as jnp
import numpy as np

from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.matched import Terms
from hpr_jax.losses.matching import solve_on_host
from hpr_jax.types import DenoisingQueries, Outputs, Targets


def loss_terms(criterion: Criterion, outputs: Outputs, targets: Targets, denoising: DenoisingQueries | None = None) -> Terms:
    """`criterion.terms` of the solutions of `criterion.requests`."""
    requests = criterion.requests(outputs, targets)
    repeats = [request.repeats for request in requests]
    costs = [jax.lax.stop_gradient(request.cost) for request in requests]
    shapes = [jax.ShapeDtypeStruct(request.query_valid.shape, jnp.int32) for request in requests]

    def solve(*arrays):
        costs, query_valid, target_valid = jax.tree.map(np.asarray, arrays)
        return solve_on_host(costs, query_valid, target_valid, repeats)

    valid = [request.query_valid for request in requests]
    return criterion.terms(outputs, targets, denoising, jax.pure_callback(solve, shapes, costs, valid, targets.valid))
