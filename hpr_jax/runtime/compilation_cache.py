"""Keeps compiled programs on disk, so that later runs need not compile them again."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax

log = logging.getLogger("hpr_jax")


def enable_compilation_cache() -> None:
    """From now on keeps programs that took more than a second to compile, below the user's cache folder (`XDG_CACHE_HOME`).

    The environment variable `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` switches
    the cache off. If there is no place for it, the log says so.
    """
    # JAX's settings are attributes that its types do not list.
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpr_jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # The user has no home folder, or it cannot be written to.
        log.info("Compiled programs are not kept: %s. JAX_COMPILATION_CACHE_DIR can name a folder for them.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _processor() -> str:
    """A name for the kind of processor. Machines may share a home folder, and code compiled for one kind may not run on
    another."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256(''.join(features).encode()).hexdigest()[:12]}"
