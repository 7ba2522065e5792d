"""What all tests share: the CPU, quick compilation, compiled programs kept between runs, and fixtures."""

import gc
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Test programs are small, and compiling them takes longer than running them: XLA optimises them less, and in one thread, for
# pytest runs on all cores. The flags are those of JAX 0.10; a version that does not know a flag ends the process.
if version("jax").startswith("0.10."):
    flags = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ.setdefault("XLA_FLAGS", flags)

import hypothesis
import jax
import pytest

from hpr_jax.models import build

# With this profile, the tests that use helpers/mutations.py try many examples.
hypothesis.settings.register_profile("many")

# Compiled programs are kept beside pytest's own cache; nothing else outlives a test run.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Programs do not note which lines of code their operations come from: lowering takes a tenth of the time less.
jax.config.update("jax_traceback_in_locations_limit", 0)

# Tracing makes millions of objects that live on; looking through them for garbage takes a tenth of the time.
gc.set_threshold(200_000, 50, 1000)

make_builder = build.builder
builders: dict[str, Any] = {}


def known_builder(config, num_classes, compute):
    """`hpr_jax.models.build.builder`, cached: many tests make the same detector."""
    settings = str((config, num_classes, compute))
    if settings not in builders:
        builders[settings] = make_builder(config, num_classes, compute)
    return builders[settings]


build.builder = known_builder

# Test files that take a minute or more each. They start first, in this order: started last, one of them would run alone on
# one core at the end. Files that compile the same programs do not follow each other: side by side, each would compile them.
SLOWEST_FILES = (
    "test_resuming.py",
    "test_refiners.py",
    "test_tutorials.py",
    "test_wheel.py",
    "test_training.py",
    "test_reference_parity.py",
    "test_devices.py",
    "test_train_step.py",
    "test_gpu_compiler.py",
    "test_swin.py",
)

# Test files that compile programs of a detector or start many processes: `scripts/test --quick` leaves them out.
COMPILING_FILES = (
    *SLOWEST_FILES,
    "test_check_data.py",
    "test_chunks.py",
    "test_compute.py",
    "test_convert.py",
    "test_costs.py",
    "test_describe.py",
    "test_detector.py",
    "test_export.py",
    "test_grow.py",
    "test_initial_weights.py",
    "test_initialisation.py",
    "test_interaction_values.py",
    "test_kernel_lowering.py",
    "test_manual_axes.py",
    "test_old_checkpoints.py",
    "test_onnx_export.py",
    "test_onnx_operations.py",
    "test_ops.py",
    "test_pictures.py",
    "test_published.py",
    "test_query_values.py",
    "test_recognize.py",
    "test_refiner_values.py",
    "test_report.py",
    "test_sampling_implementations.py",
    "test_serve.py",
    "test_tfds.py",
    "test_torch_import.py",
    "test_unfinished_run.py",
    "test_workers.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in COMPILING_FILES:
            item.add_marker("compiles")
    places = {name: place for place, name in enumerate(SLOWEST_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture
def restored_log():
    """Undoes what a test does to the log: it sends the log to the console or to a file, and away from pytest."""
    loggers = [logging.getLogger(name) for name in ("hpr_jax", "absl")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    yield
    for logger, (level, propagate, handlers) in zip(loggers, before):
        for handler in [handler for handler in logger.handlers if handler not in handlers]:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(scope="session")
def coco(tmp_path_factory):
    """A data set of `tiny.write_coco`; tests must not change it."""
    import tiny

    return tiny.write_coco(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def trained(coco, tmp_path_factory):
    """The workdir of a finished run of four steps, and its metrics; tests must not change it."""
    import tiny

    from hpr_jax.training.run import train

    workdir = tmp_path_factory.mktemp("trained")
    metrics = train(tiny.config(coco), workdir)
    return workdir, metrics


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A COCO folder of `folders.write_folder`; tests must not change it."""
    from folders import write_folder

    return write_folder(tmp_path_factory.mktemp("coco") / "data")


@pytest.fixture(scope="session")
def tfds_directory(folder, tmp_path_factory):
    """The data of `folder` as a TFDS directory; tests must not change it."""
    from folders import settings

    from hpr_jax.data.sources.tfds_writer import make_tfds

    return make_tfds(settings(folder), tmp_path_factory.mktemp("tfds"))
