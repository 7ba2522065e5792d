"""What importing the modules of data sets imports."""

import json
import subprocess
import sys

SCRIPT = """
import importlib, json, pkgutil, sys
import hpr_jax.data

names = [module.name for module in pkgutil.walk_packages(hpr_jax.data.__path__, "hpr_jax.data.")]
for name in names:
    if name != "hpr_jax.data.build":
        importlib.import_module(name)
print(json.dumps([names, list(sys.modules)]))
"""


def test_modules_import_neither_jax_nor_tensorflow():
    """Processes that load data would pay for them in time and memory."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    names, imported = json.loads(done.stdout)
    assert {"hpr_jax.data.loading.workers", "hpr_jax.data.sources.tfds", "hpr_jax.data.augmentation.views"} <= set(names)
    heavy = {"jax", "flax", "grain", "tensorflow", "tensorflow_datasets", "hpr_jax.types"}
    assert heavy.isdisjoint(imported)
    assert not [name for name in imported if name.startswith("hpr_jax.runtime")]
