"""Elementwise losses. They neither sum nor weight."""

import jax
import jax.numpy as jnp


def sigmoid_cross_entropy(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Binary cross entropy of logits of any shape, against targets in [0, 1] of the same shape."""
    return -(target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))


def sigmoid_focal_loss(logits: jax.Array, target: jax.Array, *, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """Focal loss (Lin et al. 2017, equation 5) of logits of any shape, against targets in {0, 1} of the same shape."""
    probability = jax.nn.sigmoid(logits)
    missing = target * (1 - probability) + (1 - target) * probability
    weight = target * alpha + (1 - target) * (1 - alpha)
    return weight * missing**gamma * sigmoid_cross_entropy(logits, target)


def quality_focal_loss(logits: jax.Array, quality: jax.Array, positive: jax.Array, *, beta: float = 2.0) -> jax.Array:
    """Quality focal loss (Li et al. 2020, equation 3): cross entropy against a soft target.

    Args:
      logits: any shape.
      quality: targets in [0, 1] where `positive`, same shape or one that broadcasts to it. Elsewhere the target is zero.
      positive: bool, same shape as the logits.
    """
    probability = jax.nn.sigmoid(logits)
    target = jnp.where(positive, quality, 0.0)
    return jnp.abs(target - probability) ** beta * sigmoid_cross_entropy(logits, target)
