"""Memory goes back to the system, and compiled programs are kept between runs."""

import ctypes
from types import SimpleNamespace

import jax

from hpr_jax.runtime.compilation_cache import enable_compilation_cache
from hpr_jax.runtime.host_memory import return_freed_memory, return_memory_of_compiling


def test_memory_goes_back(monkeypatch):
    trims: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trims.append))
    return_memory_of_compiling()
    return_memory_of_compiling()
    run = jax.jit(lambda x: x + 1)
    run(1.0)
    assert trims == [0]
    run(2.0)
    assert trims == [0]
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    return_freed_memory()


def test_programs_are_kept_in_the_users_cache(monkeypatch, tmp_path):
    set_before = jax.config.values["jax_compilation_cache_dir"]
    least = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        enable_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] == set_before
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"].startswith(str(tmp_path / "hpr_jax"))
        jax.config.update("jax_compilation_cache_dir", None)
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        enable_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", set_before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
