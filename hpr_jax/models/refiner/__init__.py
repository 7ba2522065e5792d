"""The hybrid refiner: decoder layers in which several refiners work on the same queries.

The name of a refiner in a config is the name of a file here.
May import layers, attention and heads of models, ops and types.
"""
