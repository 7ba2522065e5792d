"""Settings that interactions share, for tests that make one alone."""

from hpr_jax.models.refiner.interaction import SharedSettings


def shared(channels: int, *, region_size: int = 1, levels: int = 1) -> SharedSettings:
    """Settings of a detector with so many channels."""
    return SharedSettings(channels=channels, heads=1, levels=levels, points=1, region_size=region_size)
