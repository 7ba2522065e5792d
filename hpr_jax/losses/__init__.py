"""Matching and losses. Reads `hpr_jax.types`, never a model."""
