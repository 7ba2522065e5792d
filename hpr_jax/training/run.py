"""Puts a training run together from its config and its data."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hpr_jax.config import to_plain
from hpr_jax.data.build import load_training_data, make_plan, make_views, room_for_boxes
from hpr_jax.data.dataset import Dataset
from hpr_jax.data.loading.batches import TrainLoader, train_batches
from hpr_jax.data.log_dropped import log_dropped
from hpr_jax.data.suitability import check_evaluation_data, check_training_data, too_few_queries
from hpr_jax.evaluation.evaluator import Evaluator
from hpr_jax.losses.build import make_criterion
from hpr_jax.models.build import Compute
from hpr_jax.runtime.devices import data_mesh, is_main_process
from hpr_jax.runtime.logs import log_to_file
from hpr_jax.settings import check
from hpr_jax.training.batch_size import log_choice, resolve_batch_size
from hpr_jax.training.build import advice_on_dtype, check_batch, check_matching, in_steps, make_optimizer, warn_of_recipe
from hpr_jax.training.callbacks import Callback, Callbacks
from hpr_jax.training.loop import TrainingLoop
from hpr_jax.training.metric_writer import MetricWriter
from hpr_jax.training.pictures import RunPictures
from hpr_jax.training.resume import check_same_everywhere, dependencies, resume
from hpr_jax.training.state import initial_state
from hpr_jax.training.step import make_train_step
from hpr_jax.training.stopping import StopRequests
from hpr_jax.training.wandb_sink import WandbSink, require_wandb
from hpr_jax.training.workdir_lock import owned
from hpr_jax.weights.checkpoint import Meta
from hpr_jax.weights.checkpoint_writer import Checkpoints
from hpr_jax.weights.find_checkpoint import has_begun
from hpr_jax.weights.pretrained import initial_weights

log = logging.getLogger("hpr_jax")


def report_data(train: Dataset, usable: Dataset, val: Dataset) -> None:
    """Logs how many images there are, and what was dropped and left out.

    Args:
      train: the training split.
      usable: those of its images that are trained on.
      val: the validation split.
    """
    for dataset in (train, val):
        log_dropped(dataset)
    log.info(
        "%d training images (%d left out), %d validation images, %d classes",
        len(usable),
        len(train) - len(usable),
        len(val),
        len(train.classes.names),
    )


def train(
    config: ConfigDict,
    workdir: Path,
    *,
    accept_changes: bool = False,
    take_over: bool = False,
    callbacks: Sequence[Callback] = (),
) -> dict[str, float]:
    """Trains, going on from the workdir's latest checkpoint if there is one; returns the metrics of the last evaluation.

    Args:
      accept_changes: goes on even if settings or data are others than those that the run began with.
      take_over: begins even if the file system cannot tell whether another run is at work in the workdir.
      callbacks: what hears of steps, evaluations and checkpoints, and may end the run.

    Raises:
      UserError: the run cannot be trained with these settings or data, or another run is at work in the workdir.
      RunError: the loss is not finite, a checkpoint cannot be written, or images can no longer be read; in that case the run
        is saved.
      StoppedError: a signal asked the run to stop; it is saved.
    """
    check(config)
    # Raises an error about wrong settings now; the detector reads them later.
    Compute(**config.compute)
    criterion = make_criterion(config)
    mesh = data_mesh()
    check_batch(config, mesh.size)
    check_matching(config.train.matching, mesh.devices.flat[0].platform)
    require_wandb(config.train.wandb)
    warn_of_recipe(config)
    advice = advice_on_dtype(config.compute.dtype, mesh.devices.flat[0].platform)
    if advice:
        log.info("%s", advice)
    train_split, val_set = load_training_data(config)
    train_set = train_split.subset(keep_empty=config.data.keep_empty, min_side=config.data.min_side)
    check_training_data(train_split, train_set, config.data.min_side, config.data.threads)
    check_evaluation_data(val_set, config.data.threads)
    config, chosen = resolve_batch_size(config, workdir, train_set, mesh)
    check_batch(config, mesh.size)
    plan = make_plan(config, train_set)
    given, config = config, in_steps(config, plan.steps_per_epoch)
    meta = Meta(to_plain(config), train_set.classes, 0, {}, dependencies(train_split, val_set))
    check_same_everywhere(meta)
    # Nothing is written before this line, so that wrong settings or data leave no files behind.
    with owned(workdir, take_over=take_over):
        log_to_file(workdir / ("train.log" if is_main_process() else f"train.{jax.process_index()}.log"))
        report_data(train_split, train_set, val_set)
        if chosen is not None:
            log_choice(chosen, given)
        for dataset in (train_set, val_set):
            sentence = too_few_queries(dataset, config.model.queries.count)
            if sentence:
                log.warning("%s", sentence)
        views = make_views(config, train_set)
        max_boxes = room_for_boxes(config, train_set, views)
        begun = has_begun(workdir)
        weights = None if begun else initial_weights(config)
        if weights is not None:
            log.info("The run begins with the weights %s.", weights)
        graph, state = initial_state(config, len(train_set.classes.names), mesh, weights)
        log.info(
            "%.1f million parameters, %.1f trained", *(_millions(s) for s in ((state.params, state.frozen), state.params))
        )
        what = "images, a weak and a strong view of each," if views.strong else "images"
        log.info("batches of %d %s in the shapes %s", plan.batch_size, what, ", ".join(f"{h}x{w}" for h, w in plan.buckets))
        if mesh.size > 1:
            log.info("on %d devices of %d processes", mesh.size, jax.process_count())

        checkpoints = Checkpoints(workdir, config.train.keep_checkpoints)
        state, progress = resume(checkpoints, state, meta, accept_changes)
        start, steps = int(state.step), config.train.steps
        if start >= steps:
            log.info("Step %d of %d is done already.", start, steps)
        share = jax.process_index(), jax.process_count()
        loader = TrainLoader(plan, views, max_boxes, share, config.data.patience)
        evaluator = Evaluator(config, val_set, graph)
        settings = config.train
        step_function = make_train_step(
            graph,
            criterion,
            make_optimizer(config),
            settings.seed,
            settings.ema_decay,
            settings.accumulation_steps,
            mesh,
            settings.matching,
        )
        sink = WandbSink(settings.wandb, workdir, meta.config) if is_main_process() else None
        with StopRequests() as requests, MetricWriter(workdir if is_main_process() else None, start, sink) as writer:
            drawn = workdir if settings.plots and is_main_process() else None
            pictures = RunPictures(drawn, writer, {"training": train_set, "validation": val_set})
            loop = TrainingLoop(
                config, mesh, checkpoints, evaluator, meta, writer, requests, progress, Callbacks(callbacks), pictures
            )
            batches = train_batches(loader, start, max(start, steps), config.data.threads, config.data.workers)
            try:
                return loop.run(step_function, state, batches)
            finally:
                # Threads that wait for images end, too.
                loader.patience.ended = True
                batches.close()
                loop.close()


def _millions(state: Any) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(state)) / 1e6
