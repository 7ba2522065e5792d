"""What commands do before they compute: set up the log and JAX's compilation cache, and join other processes."""

import importlib
import logging
import os

from hpr_jax.errors import UserError
from hpr_jax.runtime.absent_gpu import no_words_about_gpus
from hpr_jax.runtime.logs import log_to_console


def start(*, distributed: bool = False, platform: str | None = None) -> None:
    """Prepares this process for computing with JAX.

    Args:
      distributed: joins the other processes of the run. Then only process 0 logs progress; every process logs its warnings.
      platform: that JAX computes on; None for its choice.

    Raises:
      UserError: JAX has no device, or the environment is wrong.
    """
    log_to_console()
    if platform is not None:
        os.environ["JAX_PLATFORMS"] = platform
    with no_words_about_gpus():
        _start_jax(distributed)


def _start_jax(distributed: bool) -> None:
    """Does what `start` does that takes JAX."""
    try:
        jax = importlib.import_module("jax")
    except ValueError as error:
        # JAX reads its settings from the environment while it is imported.
        raise UserError(f"JAX cannot be used with this environment: {error}.") from error
    if os.environ.get("JAX_PLATFORMS"):
        # A config file may have imported JAX before this was the platform.
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    from hpr_jax.runtime.compilation_cache import enable_compilation_cache
    from hpr_jax.runtime.devices import is_main_process, join_processes, require_devices
    from hpr_jax.runtime.host_memory import return_memory_of_compiling

    enable_compilation_cache()
    return_memory_of_compiling()
    if distributed:
        join_processes()
        if not is_main_process():
            log_to_console(logging.WARNING)
    require_devices()
