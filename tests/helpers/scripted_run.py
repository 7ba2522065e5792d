"""Runs without a detector, for tests of the training loop: a state is a single parameter, which counts the steps."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hpr_jax.evaluation.evaluator import EvaluationResult
from hpr_jax.runtime.devices import replicate
from hpr_jax.training.state import TrainState


def script(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Replaces the detector's state, its steps and its evaluation, and remembers what they are given.

    After step n the parameter is n, its average -n, and the numbers are n (loss), 10 n (gradient's norm) and 100 n (a term);
    the precision of the k-th evaluation is the k-th of `precisions`.
    """
    seen = types.SimpleNamespace(rates=[], settings=[], evaluated=[], precisions=iter([0.5] * 99), mesh=None)

    def initial_state(config, num_classes, mesh, weights):
        def parameter():
            return nnx.State({"count": nnx.Param(jnp.zeros(2))})

        seen.mesh = mesh
        average = parameter() if config.train.ema_decay else None
        frozen = nnx.State({"frozen": nnx.Variable(jnp.ones(2))})
        return None, replicate(mesh, TrainState(jnp.int32(0), parameter(), frozen, {"moments": jnp.zeros(2)}, average))

    class Step:
        compilations = 7

        def __call__(self, state, batch, rate):
            number = int(jax.device_get(state.step)) + 1
            seen.rates.append(rate)
            counts = {name: np.sum(count) for name, count in jax.device_get(batch.counts).items()}

            def filled(tree, value):
                return jax.tree.map(lambda _: replicate(seen.mesh, np.full(2, value, np.float32)), tree)

            params, average = filled(state.params, number), filled(state.average, -number)
            step = replicate(seen.mesh, np.int32(number))
            state = dataclasses.replace(state, step=step, params=params, average=average)
            return state, {"loss": number, "gradient_norm": 10 * number, "layer_0/class": 100 * number, **counts}

    class ScriptedEvaluator:
        compilations = 3

        def __init__(self, config, dataset, graph):
            seen.evaluated_on = dataset

        def run(self, state):
            seen.evaluated.append(float(nnx.to_pure_dict(state)["count"][0]))
            precision = next(seen.precisions)
            # AP50 falls where AP rises, so that the one cannot pass for the other.
            metrics = {"AP": precision, "AP50": 1 - precision}
            return EvaluationResult(metrics, {"cup": {"AP": precision, "AP50": precision}}, [])

    monkeypatch.setattr("hpr_jax.training.run.initial_state", initial_state)
    monkeypatch.setattr("hpr_jax.training.run.make_train_step", lambda *settings: seen.settings.append(settings) or Step())
    monkeypatch.setattr("hpr_jax.training.run.Evaluator", ScriptedEvaluator)
    return seen
