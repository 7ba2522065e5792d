"""Batches: which images each is made of, the shape they are padded to, and how they are loaded.

A plan follows from a seed alone, so that every process and every resumed run has the same plan.
May import the top of data and augmentation. Imports no JAX, since worker processes do without it.
"""
