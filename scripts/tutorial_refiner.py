# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A refiner of your own
#
# A decoder layer of HPR has several paths, one for each refiner: self-attention, an *interaction* with the image, and
# a feed-forward network. The interaction is what refiners differ in. This notebook writes one in thirty lines, trains
# it beside deformable attention, and compares it with one of the package, at equal steps.
#
# `scripts/tutorial.py` is the notebook to read first. `jupytext --to ipynb scripts/tutorial_refiner.py` turns this
# file into a notebook; Jupyter with jupytext opens it as it is.

# %%
import os
from pathlib import Path

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import hpr_jax

# The training steps of each run. With 400, everything takes about six minutes on two CPU cores.
STEPS = int(os.environ.get("TUTORIAL_STEPS", "400"))
FOLDER = Path(f"runs/tutorial_refiner/{STEPS}_steps")

# %% [markdown]
# ## The interaction
#
# It maps queries `[B, Q, C]` to refined queries `[B, Q, C]`, and may look at
#
# - `position`, the encodings of the queries' boxes, `[B, Q, C]`;
# - `surroundings.regions`, the features within each query's box, cut out by RoIAlign: `[B, Q, bins, C]`;
# - `surroundings.memory`, the encoder's output, with `.tokens` `[B, S, C]` of all levels;
# - `surroundings.reference_boxes`, `[B, Q, 4]`.
#
# `needs_regions` says whether RoIAlign has to be computed. Layers of Flax will do. The constructor gets the sizes
# that all interactions share, then settings of its own with their defaults.
#
# This one glances at its region once: the bins that match the query best count most, and a gate decides how much of
# what was seen goes into each channel of the query.


# %%
@hpr_jax.register_refiner("glance")
class Glance(nnx.Module):
    """Each query takes a weighted mean of its region, through a gate."""

    needs_regions = True

    def __init__(self, shared: hpr_jax.SharedSettings, *, sharpness: float = 1.0, rngs: nnx.Rngs):
        channels = shared.channels
        self.ask = nnx.Linear(channels, channels, rngs=rngs)
        self.take = nnx.Linear(channels, channels, rngs=rngs)
        self.gate = nnx.Linear(2 * channels, channels, rngs=rngs)
        self.norm = nnx.LayerNorm(channels, rngs=rngs)
        self.scale = sharpness * channels**-0.5

    def __call__(self, query: jax.Array, position: jax.Array, surroundings: hpr_jax.Surroundings) -> jax.Array:
        regions = surroundings.regions
        match = jnp.einsum("bqc,bqnc->bqn", self.ask(query + position), regions)
        seen = jnp.einsum("bqn,bqnc->bqc", jax.nn.softmax(self.scale * match), regions)
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([query, seen], axis=-1)))
        return query + gate * self.norm(self.take(seen))


# %% [markdown]
# From now on settings can name it. Before it trains: does it have the parameters that it should, and how do they
# compare with those of the package's refiners?

# %%
for name in ("glance", "regional_attention", "dynamic_conv"):
    description = hpr_jax.describe("ddq.py:demo", classes=4, overrides={"model.refiner.auxiliaries": (name,)})
    (path,) = [module for module in description.modules if module.name == name]
    print(f"{name:20}{path.trained:8,} parameters of {description.total.trained:,}")

# %% [markdown]
# ## Training
#
# Two runs that differ in one setting, on the same drawn shapes and in the same order: deformable attention with
# `glance` beside it, and with `regional_attention`, the package's way of attending to a region.

# %%
SETTINGS = {
    "augmentation.sides": (64,),
    "augmentation.max_side": 64,
    "evaluate.side": 64,
    "evaluate.max_side": 64,
    "model.encoder.layers": 1,
    "model.queries.count": 10,
    "compute.remat": (),
    "train.steps": STEPS,
    "train.evaluate_every": max(STEPS // 5, 1),
    "train.log_every": max(STEPS // 40, 1),
    "train.plots": False,
    "optimizer.warmup_steps": STEPS // 20,
    "optimizer.milestones": (max(STEPS * 4 // 5, 1),),
}


class Progress(hpr_jax.Callback):
    """Prints the average precision whenever the detector is evaluated."""

    def on_evaluation(self, step, result):
        print(f"step {step}: AP {result.metrics['AP']:.3f}, AP50 {result.metrics['AP50']:.3f}")


data = hpr_jax.make_shapes(FOLDER / "data", train=400, val=60, most=2, radii=(0.15, 0.3))
runs = {}
for name in ("glance", "regional_attention"):
    print(name)
    runs[name] = hpr_jax.train(
        "ddq.py:demo",
        data=data,
        workdir=FOLDER / name,
        overrides=SETTINGS | {"model.refiner.auxiliaries": (name,)},
        callbacks=[Progress()],
    )

# %% [markdown]
# ## Comparing
#
# Every number that a run logs is in its history. Each branch has losses of its own: those of the auxiliary branch
# tell how well the refiner does by itself.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5))
for name, run in runs.items():
    panels[0].plot(*run.history.series("loss"), label=name)
    panels[1].plot(*run.history.series(f"term/{name}/layer_1/giou"), label=name)
for axes, title in zip(panels, ("loss", "GIoU loss of the auxiliary branch, last layer")):
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.legend()
plt.show()
for name, run in runs.items():
    print(f"{name:20} AP {run.metrics['AP']:.3f}")

# %% [markdown]
# ## The merges over time
#
# The primary path goes on with a weighted sum of all paths, with a weight for each channel, all 1 at the beginning.
# The curves are the mean sizes of the weights in each layer: a path that is worth nothing is weighted down.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 3.5), sharey=True)
for axes, (name, run) in zip(panels, runs.items()):
    for series in run.history.names("merge/"):
        _, place, layer, path = series.split("/")
        axes.plot(*run.history.series(series), "-" if path == name else "--", label=f"{place}, {layer}, {path}")
    axes.set_title(f"deformable and {name}")
    axes.set_xlabel("step")
    axes.legend(fontsize=7)
plt.show()

# %% [markdown]
# Weights move slowly at the rate of the rest; `optimizer.merge_multiplier` makes them faster. And one run each says
# little: before you believe a difference, repeat it with several values of `train.seed`.
#
# ## Loading it again
#
# A checkpoint stores the name of a refiner, not its code. Here, where `glance` is registered, it loads like any
# other. Another program imports the file that registers it first; the command line takes a config file that does so,
# as `--config`. Without that, the name of what is missing is all that there is to say.

# %%
detector = hpr_jax.load(runs["glance"].workdir)
detector.explain(next((data / "val2017").iterdir()))

# %% [markdown]
# When a refiner has proved itself, it becomes a file of the package: CONTRIBUTING says which two lines name it.
