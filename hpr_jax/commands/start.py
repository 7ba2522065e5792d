"""What commands do before they compute: set up the log and JAX's compilation cache, and join other processes."""

import importlib
import logging

from hpr_jax.errors import UserError
from hpr_jax.runtime.logs import log_to_console


def start(*, distributed: bool = False) -> None:
    """Prepares this process for computing with JAX.

    Args:
      distributed: joins the other processes of the run. Then only process 0 logs progress; every process logs its warnings.

    Raises:
      UserError: JAX has no device, or the environment is wrong.
    """
    log_to_console()
    try:
        importlib.import_module("jax")
    except ValueError as error:
        # JAX reads its settings from the environment while it is imported.
        raise UserError(f"JAX cannot be used with this environment: {error}.") from error
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
