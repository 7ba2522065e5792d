"""Shows what a detector finds on a web page, and answers programs in JSON.

examples:
  python -m hpr_jax.main serve --workdir runs/mine
  python -m hpr_jax.main serve --checkpoint hf://me/mine --port 9000 --batch-size 8
"""

import os
from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_checkpoint, add_config, check_folder
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.serving.limits import Limits

# The range of the numbers among the arguments.
_LEAST = {"batch_size": 1, "timeout": 0.001, "max_requests": 1, "max_upload": 0.001, "max_pixels": 0.001}
_MOST = 100_000


def add_arguments(parser: CommandParser) -> None:
    add_checkpoint(parser)
    add_config(parser, "settings in place of the checkpoint's; the model must be the same")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1, which only this machine reaches)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free (default 8000)")
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name by which requests may call this machine",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="the most images that are computed together (default: as evaluation does on a CPU, else 8)",
    )
    defaults = Limits()
    parser.add_argument(
        "--timeout",
        type=float,
        default=defaults.seconds,
        metavar="SECONDS",
        help="until a request is given up (default %(default)g)",
    )
    parser.add_argument(
        "--max-requests",
        type=int,
        default=defaults.requests,
        metavar="N",
        help="requests that may wait; more are sent away (default %(default)d)",
    )
    parser.add_argument(
        "--max-upload",
        type=float,
        default=defaults.upload / 2**20,
        metavar="MIB",
        help="largest upload (default %(default)g)",
    )
    parser.add_argument(
        "--max-pixels",
        type=float,
        default=defaults.pixels / 1e6,
        metavar="MILLIONS",
        help="largest image (default %(default)g)",
    )


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Serves as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not (arguments.workdir or arguments.checkpoint):
        raise UserError("Serving needs --workdir DIR, the folder of a run, or --checkpoint PATH.")
    if not 0 <= arguments.port <= 65535:
        raise UserError(f"--port is {arguments.port}; it must be from 0 to 65535.")
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= _MOST:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}; it must be from {least:g} to {_MOST}.")
    check_folder(arguments.workdir, "workdir")
    limits = Limits(
        upload=int(arguments.max_upload * 2**20),
        pixels=int(arguments.max_pixels * 1e6),
        seconds=arguments.timeout,
        requests=arguments.max_requests,
    )
    # A second wall behind the look at headers: OpenCV reads it when it is imported.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(limits.pixels))
    from hpr_jax.serving.serve import listen, require_libraries, serve

    require_libraries()
    config = load_config(arguments.config, overrides) if arguments.config else None
    with listen(arguments.host, arguments.port) as listener:
        start()
        serve(
            arguments.checkpoint or arguments.workdir,
            listener,
            limits,
            batch_size=arguments.batch_size,
            names=arguments.allow_host,
            overrides=dict(overrides),
            config=config,
        )
