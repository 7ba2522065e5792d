"""The hybrid refiner: decoder layers in which several refiners work side by side on the same queries.

A refiner's name in a config is the name of the file here that holds its interaction with the image.
May import layers, attention and heads of models, ops and types.
"""
