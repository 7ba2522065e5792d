"""Draws what a detector finds in pictures and videos, and writes the boxes as JSON.

examples:
  python -m hpr_jax.main predict --workdir runs/mine street.jpg photographs/
  python -m hpr_jax.main predict --workdir runs/mine --tile 800 --overlap 0.2 satellite.png
  python -m hpr_jax.main predict --workdir runs/mine --track crossing.mp4
"""

from argparse import Namespace

from hpr_jax.commands.arguments import CommandParser, Overrides, add_checkpoint, add_config, check_folder, path
from hpr_jax.commands.start import start
from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.inference.find_inputs import find_inputs
from hpr_jax.inference.video import is_video
from hpr_jax.inference.video_extra import require


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("inputs", nargs="*", type=path, metavar="INPUT", help="images, videos, and folders of them")
    add_checkpoint(parser)
    add_config(parser, "settings in place of the checkpoint's; the model must be the same")
    parser.add_argument(
        "--output",
        type=path,
        metavar="DIR",
        help="folder for pictures, videos and predictions.json (default: WORKDIR/predictions)",
    )
    parser.add_argument("--recursive", action="store_true", help="take files of folders in the folders, too")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a detection (default 0.3)")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="look at so many images or frames together, which GPUs do faster where sizes are alike (default 1)",
    )
    parser.add_argument(
        "--track", action="store_true", help="give the objects of a video numbers that they keep (ByteTrack; extra `video`)"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="look at each N-th frame of a video alone (default 1)",
    )
    parser.add_argument("--tile", type=int, metavar="SIDE", help="look at large images in tiles of so many pixels")
    parser.add_argument(
        "--overlap", type=float, default=0.2, help="part of a tile's side that neighbours share (default 0.2)"
    )
    parser.add_argument(
        "--merge", default="nmm", help="how boxes on seams become one: nmm joins them, nms keeps the best (default nmm)"
    )


def run(arguments: Namespace, overrides: Overrides) -> None:
    """Predicts as the arguments say.

    Raises:
      UserError: the command cannot be carried out.
    """
    if not arguments.workdir and not (arguments.checkpoint and arguments.output):
        raise UserError("Predicting needs --workdir DIR, the folder of a run, or --checkpoint DIR and --output DIR.")
    if not 0 <= arguments.threshold <= 1:
        raise UserError(f"The threshold is a score between 0 and 1, not {arguments.threshold}.")
    check_folder(arguments.workdir, "workdir")
    check_folder(arguments.output, "output folder")
    for name in ("batch", "every"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} is a number from 1, not {getattr(arguments, name)}.")
    files = find_inputs(arguments.inputs, recursive=arguments.recursive)
    videos = [file for file in files if is_video(file)]
    if not videos and (arguments.track or arguments.every > 1):
        raise UserError(f"{'--track' if arguments.track else '--every'} is for videos, and the inputs are images alone.")
    if set(videos) & set(arguments.inputs):
        require("av")
    if arguments.track:
        require("trackers")
    config = load_config(arguments.config, overrides) if arguments.config else None
    start()
    from hpr_jax.inference.predict import predict

    tiling = None
    if arguments.tile is not None:
        from hpr_jax.inference.tiles import Tiling

        tiling = Tiling(arguments.tile, arguments.overlap, arguments.merge)
    output = arguments.output or arguments.workdir / "predictions"
    checkpoint = arguments.checkpoint or arguments.workdir
    predict(
        checkpoint,
        arguments.inputs,
        output,
        arguments.threshold,
        overrides,
        config,
        recursive=arguments.recursive,
        tiling=tiling,
        batch=arguments.batch,
        track=arguments.track,
        every=arguments.every,
    )
