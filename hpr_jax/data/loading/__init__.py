"""Batches: which images make one up, in which padded shape, and how they are loaded.

A plan follows from a seed alone, so that every process and every resumed run has the same.
May import the top of data and augmentation. Imports no JAX, since processes that load data do not.
"""
