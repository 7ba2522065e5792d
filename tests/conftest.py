"""Settings for all tests: CPU, quick compilation, compiled programs kept between runs."""

import os
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test programs are small, and compiling them takes longer than running them. Newer versions end at a flag they do not know.
if version("jax").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")

import jax

jax.config.update("jax_compilation_cache_dir", f"{tempfile.gettempdir()}/hpr_jax_test_cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
