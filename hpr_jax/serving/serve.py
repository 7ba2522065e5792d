"""Runs the server: its socket, its signals, and its end."""

import asyncio
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from hpr_jax.errors import UserError
from hpr_jax.runtime.console import leave
from hpr_jax.serving.limits import Limits

log = logging.getLogger("hpr_jax")

# Names of this machine that no other one reaches.
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def require_libraries() -> None:
    """Checks that the extra `serve` is installed.

    Raises:
      UserError: it is not.
    """
    for name in ("starlette", "uvicorn", "python_multipart"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            package = name.replace("_", "-")
            raise UserError(f'serve needs the package {package}; install it with pip install "hpr_jax[serve]".') from error


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address. Who connects waits until the server runs.

    Raises:
      UserError: the address is taken, or is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # At once, since others could take the address otherwise while the detector is loaded.
        listener.listen()
    except OSError as error:
        raise UserError(
            f"The server cannot be at {host}, port {port}: {(error.strerror or str(error)).lower()}; choose another --port, "
            "or --port 0 for any that is free."
        ) from error
    return listener


def serve(
    source: str | Path,
    listener: socket.socket,
    limits: Limits,
    *,
    batch_size: int | None = None,
    names: Collection[str] = (),
    overrides: Mapping[str, object] | None = None,
    config: Any = None,
) -> None:
    """Serves a detector until the process is told to stop.

    Args:
      source: as `hpr_jax.load` takes it.
      listener: of `listen`.
      limits: of what is taken.
      batch_size: the most images that are computed together; None for the detector's own, and 8 on an accelerator.
      names: more names of this machine, by which requests may call it.
      overrides, config: as `hpr_jax.load` takes them.

    Raises:
      UserError: there is no detector.
      KeyboardInterrupt: Ctrl-C has stopped it.
    """
    from hpr_jax.serving.app import make_app
    from hpr_jax.serving.connections import make_server
    from hpr_jax.serving.guard import own_names

    detector = _load(source, batch_size, dict(overrides or {}), config)
    _warm_up(detector)
    app = make_app(detector, Path(source).name or str(source), limits, own_names() | {name.lower() for name in names})
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info("The page is at http://%s:%d/; Ctrl-C stops the server.", shown, port)
    if host not in LOOPBACK:
        log.warning("Others can reach this server, which asks nobody who they are.")
    heard = _run(make_server(app, limits), listener)
    if app.state.service.batcher.busy:
        # What is being computed cannot be stopped, and would be in the way of an orderly end.
        sys.stdout.flush()
        if heard == signal.SIGINT:
            leave()
        os._exit(0)
    if heard == signal.SIGINT:
        raise KeyboardInterrupt


def _load(source: str | Path, batch_size: int | None, overrides: dict[str, object], config: Any) -> Any:
    """The detector, which computes so many images together."""
    import jax

    from hpr_jax.inference.load import load
    from hpr_jax.weights.hub import is_hub
    from hpr_jax.weights.source import is_exported

    if not is_hub(source) and is_exported(Path(source).expanduser()):
        if batch_size is not None:
            raise UserError(f"How many images {source} takes was chosen when it was exported; leave out --batch-size.")
    elif batch_size is not None or jax.default_backend() != "cpu":
        overrides.setdefault("evaluate.batch_size", batch_size or 8)
    return load(source, overrides=overrides, config=config)


def _warm_up(detector: Any) -> None:
    """Compiles the programs for landscape photographs, so that the first one is not kept waiting. Other shapes are compiled
    when an image has them."""
    import numpy as np

    start = time.monotonic()
    image = np.zeros((480, 640, 3), np.uint8)
    try:
        for count in sorted({1, int(detector.config.evaluate.batch_size)}):
            detector([image] * count)
    except UserError:
        # Exported programs may take images of other sizes alone.
        return
    log.info("Compiled in %.0f s.", time.monotonic() - start)


def _run(server: Any, listener: socket.socket) -> int:
    """Runs a server until SIGTERM or Ctrl-C; then ends what it is working on, for a while, or until another Ctrl-C. Returns
    the number of the signal."""
    heard = [0]

    def stop(number: int, frame: FrameType | None) -> None:
        heard[0] = number
        server.handle_exit(number, frame)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(server.serve([listener]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return heard[0]
