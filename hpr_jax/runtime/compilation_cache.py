"""Compiled programs are kept between runs."""

import hashlib
import logging
import os
import platform
from pathlib import Path

import jax

log = logging.getLogger("hpr_jax")


def enable_compilation_cache() -> None:
    """Keeps programs that took more than a second to compile, below the user's cache folder (`XDG_CACHE_HOME`).

    `JAX_COMPILATION_CACHE_DIR` names another folder, `JAX_ENABLE_COMPILATION_CACHE=false` switches it off.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpr_jax" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        # Of a user without a home, or one that cannot be written to.
        log.info("Compiled programs are not kept: %s. JAX_COMPILATION_CACHE_DIR can name a folder for them.", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _processor() -> str:
    """Tells kinds of processors apart: home folders are shared by machines, and one's code may not run on another."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else [platform.processor()]
    features = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}) or lines[:1]
    return f"{platform.machine()}-{hashlib.sha256(''.join(features).encode()).hexdigest()[:12]}"
