"""The devices and processes of a run.

All devices, those of other processes too, are a mesh of one axis. Batches are split over it; everything else is on every
device.
"""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hpr_jax.errors import UserError

# Name of the mesh's axis.
AXIS = "data"

# Sharding of arrays that are whole on every device.
EVERYWHERE = PartitionSpec()


def require_devices() -> None:
    """Makes sure that JAX has a device to compute on.

    Raises:
      UserError: it has none of the platforms that it is told to use.
    """
    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        # JAX adds advice in brackets to what went wrong; where nothing but the name is wrong, it asserts without words.
        why = "".join(f": {line}" for line in str(error).partition(" (")[0].splitlines()[:1])
        named = jax.config.jax_platforms  # type: ignore[attr-defined]
        kind = f" of the kind that JAX_PLATFORMS={named} asks for" if named else ""
        raise UserError(
            f"JAX has no device to compute on{kind}{why}. Unset JAX_PLATFORMS to use what this machine has; GPUs need the "
            "extra cuda12 or cuda13 of this package."
        ) from error


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, by default of all devices of all processes."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def split_at(axis: int) -> PartitionSpec:
    """Sharding of arrays that are split over the devices at an axis."""
    return PartitionSpec(*[None] * axis, AXIS)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Puts a tree of arrays, which is the same in every process, on every device."""
    return _put(NamedSharding(mesh, EVERYWHERE), tree)


def shard(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Splits a tree of arrays over the devices at `axis`. Each process gives the part for its own devices, and gets the
    global arrays."""
    return _put(NamedSharding(mesh, split_at(axis)), tree)


def _put(sharding: NamedSharding, tree: Any) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # A transfer that is asked for, although JAX's transfer guard takes it for an implicit one.
    with jax.transfer_guard("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def local_part(array: jax.Array, axis: int = 0) -> np.ndarray:
    """The part that this process has of an array that is split at `axis`, as a NumPy array; waits until it is computed."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[axis].start or 0)
    parts = jax.device_get([shard.data for shard in shards])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def on_devices_of(mesh: Mesh, tree: Any) -> Any:
    """Makes a tree of arrays, which are whole on every device or on the host, one of the devices of `mesh`, all of this
    process."""
    sharding = NamedSharding(mesh, EVERYWHERE)

    def localise(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [shard.data for shard in x.addressable_shards])

    return jax.tree.map(localise, tree)


def join_processes() -> None:
    """Joins this process with the others of a run, so that all see the devices of all.

    Their number and where they meet comes from the environment: that of Slurm or Open MPI, or the variables
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: the environment does not tell, or the other processes do not come.
    """

    def number(name: str) -> int | None:
        text = os.environ.get(name)
        if text is not None and not text.isdecimal():
            raise UserError(f"The environment variable {name} is {text!r}; it must be a whole number.")
        return None if text is None else int(text)

    # JAX's preemption service would swallow SIGTERM until training begins.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes of the run cannot be joined: {str(error).splitlines()[0]} Start them by Slurm or Open MPI, or "
            "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each."
        ) from error


def is_main_process() -> bool:
    """Whether this is the one process that writes what a run writes once."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come to this point, whose name is `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(decide: Callable[[], Any]) -> Any:
    """Calls `decide` in the main process alone, and returns its result, JSON values, in every process."""
    if jax.process_count() == 1:
        return decide()
    return gather(decide() if is_main_process() else None)[0]


def gather(value: Any) -> list[Any]:
    """Returns the values, JSON values, of all processes in every process, in their order."""
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_bytes(content: bytes) -> list[bytes]:
    """Returns the contents of all processes in every process, in their order."""
    if jax.process_count() == 1:
        return [content]
    lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32)).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths)]
