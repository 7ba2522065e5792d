"""Which stages of a backbone the neck gets maps of."""

from hpr_jax.errors import UserError


def check_first_map(first_map: int, stages: int) -> None:
    """Checks the first stage whose map is used, counted from 0.

    Raises:
      UserError: there is no such stage.
    """
    if not 0 <= first_map < stages:
        raise UserError(f"first_map is {first_map}; choose one of the backbone's {stages} stages, 0 to {stages - 1}.")
