"""The decoder's first queries: proposals, the two ways of choosing among them, and denoising queries.

The setting `queries.kind` of a config is the name of a file here: `top` or `distinct`.
May import layers and heads of models, ops and types.
"""
