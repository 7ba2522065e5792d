"""The decoder's first queries: proposals, two ways of choosing among them, and denoising queries.

A config's `queries.kind` is the name of a file here.
May import layers and heads of models, ops and types.
"""
