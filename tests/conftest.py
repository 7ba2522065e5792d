"""Settings for all tests: CPU, quick compilation, compiled programs kept between runs."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test programs are small, and compiling them takes longer than running them. Newer versions end at a flag they do not know.
if version("jax").startswith("0.10."):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0")

import jax
import pytest

from hpr_jax.models import build

# Beside pytest's own cache: compiled programs outlive a test run, and nothing else does.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

make_builder = build.builder
builders: dict[str, Any] = {}


def known_builder(config, num_classes, compute):
    """Many tests make the same detector."""
    settings = str((config, num_classes, compute))
    if settings not in builders:
        builders[settings] = make_builder(config, num_classes, compute)
    return builders[settings]


build.builder = known_builder

# They take minutes each: started last, one would run alone at the end, on one core.
SLOWEST_FILES = ("test_resuming.py", "test_training.py", "test_devices.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in SLOWEST_FILES)


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A data set of `tiny.write_coco`, to be read only."""
    import tiny

    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def trained(coco, tmp_path_factory):
    """A finished run of four steps, to be read only, and its metrics."""
    import tiny

    from hpr_jax.training.run import train

    workdir = tmp_path_factory.mktemp("trained")
    metrics = train(tiny.config(coco), workdir)
    return workdir, metrics


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A COCO folder of `folders.write_folder`, to be read only."""
    from folders import write_folder

    return write_folder(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def tfds_directory(folder, tmp_path_factory):
    """The same as a TFDS directory, to be read only."""
    from folders import settings

    from hpr_jax.data.sources.tfds_writer import make_tfds

    return make_tfds(settings(folder), tmp_path_factory.mktemp("tfds"))
