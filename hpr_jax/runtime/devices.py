"""The devices of a run, those of other processes too, as a mesh of one axis: batches are split over it, everything else is
on each of them."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hpr_jax.errors import UserError

AXIS = "data"

EVERYWHERE = PartitionSpec()


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the given devices, or of all there are in all processes."""
    return Mesh(np.array(jax.devices() if devices is None else devices), (AXIS,))


def split_at(axis: int) -> PartitionSpec:
    """Split over the devices at an axis."""
    return PartitionSpec(*[None] * axis, AXIS)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays, the same in every process, on every device."""
    return _put(NamedSharding(mesh, EVERYWHERE), tree)


def spread(mesh: Mesh, tree: Any, axis: int = 0) -> Any:
    """Global arrays from the parts along `axis` that this process has for its devices."""
    return _put(NamedSharding(mesh, split_at(axis)), tree)


def _put(sharding: NamedSharding, tree: Any) -> Any:
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # Asked for, although JAX does not count it as such.
    with jax.transfer_guard("allow"):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def local_part(array: jax.Array, axis: int = 0) -> np.ndarray:
    """What this process has of an array that is split at `axis`; waits for it."""
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[axis].start or 0)
    parts = jax.device_get([shard.data for shard in shards])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def on_devices_of(mesh: Mesh, tree: Any) -> Any:
    """A tree of arrays that every device has, as arrays on the devices of a mesh of this process alone."""
    sharding = NamedSharding(mesh, EVERYWHERE)

    def localise(x):
        if x.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_single_device_arrays(x.shape, sharding, [shard.data for shard in x.addressable_shards])

    return jax.tree.map(localise, tree)


def join_processes() -> None:
    """Makes this process one of several with common devices.

    How many there are and where they meet comes from the environment: of Slurm or Open MPI, or the variables
    JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: the environment does not say, or the others do not come.
    """
    # It would swallow SIGTERM until training begins.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        names = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
        jax.distributed.initialize(**{name: int(os.environ[key]) for name, key in names.items() if key in os.environ})
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"The processes cannot be brought together: {str(error).splitlines()[0]} Start them by Slurm or Open MPI, or "
            "set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each."
        ) from error


def leads() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Returns when every process has come to the same point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(decide: Callable[[], Any]) -> Any:
    """What the leading process decides, JSON types, in every process."""
    if jax.process_count() == 1:
        return decide()
    return gather(decide() if leads() else None)[0]


def gather(value: Any) -> list[Any]:
    """The values of all processes, JSON types, in every one of them."""
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def gather_bytes(content: bytes) -> list[bytes]:
    """The contents of all processes, in every one of them."""
    if jax.process_count() == 1:
        return [content]
    lengths = multihost_utils.process_allgather(np.array([len(content)], np.int32)).ravel()
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [row[:length].tobytes() for row, length in zip(rows, lengths)]
