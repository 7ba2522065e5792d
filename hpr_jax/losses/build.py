"""The losses of a config: its section `loss` is read here."""

import dataclasses

from ml_collections import ConfigDict

from hpr_jax.losses.aligned import AlignedMatchedLoss
from hpr_jax.losses.criterion import Criterion
from hpr_jax.losses.dense import DenseLoss
from hpr_jax.losses.matched import FocalMatchedLoss
from hpr_jax.settings import check_losses


def make_criterion(config: ConfigDict) -> Criterion:
    """The losses that a config asks for.

    Raises:
      UserError: the losses do not suit the model.
    """
    check_losses(config)
    model, loss = config.model, config.loss
    criterion = Criterion(
        branch_weights=tuple((name, loss.branch_weight) for name in model.refiner.auxiliaries),
        matched=FocalMatchedLoss(class_weight=loss.class_weight),
        proposals_of_objects=model.queries.kind == "positions",
    )
    if "dense" in loss:
        criterion = dataclasses.replace(criterion, dense=DenseLoss(**loss.dense))
    if "aligned" in loss:
        aligned = loss.aligned
        criterion = dataclasses.replace(
            criterion,
            matched=AlignedMatchedLoss(loss.class_weight, aligned.alpha, aligned.gamma, aligned.tau),
            repeats=tuple(aligned.repeats),
            proposal_repeats=aligned.proposal_repeats,
        )
    return criterion
