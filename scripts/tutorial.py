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
# # A detector, from its data to its report
#
# This notebook draws a data set, trains a small HPR detector on it, looks at what the detector finds and how, changes
# its refiners, fine-tunes it on other data, and reads the report of a run. Everything in it is the public interface
# of `hpr_jax`.
#
# It is a Python file. Jupyter opens it as a notebook where jupytext is installed (`pip install jupyterlab jupytext`),
# and `jupytext --to ipynb scripts/tutorial.py` turns it into one.

# %%
import os
from pathlib import Path

import cv2
import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import IFrame, display
from PIL import Image

import hpr_jax

# %% [markdown]
# What takes long below follows from one number: the training steps of each run. With 400, all of it takes about ten
# minutes on two CPU cores; twice as many make better detectors in almost twice the time. Runs are kept in a folder of
# their own: a cell that is run again goes on from there, and has nothing left to do.

# %%
STEPS = int(os.environ.get("TUTORIAL_STEPS", "400"))
FOLDER = Path(f"runs/tutorial/{STEPS}_steps")

# %% [markdown]
# ## Data
#
# Any folder in the format of COCO, YOLO or Pascal VOC will do. Here is how little that is, for YOLO: images, a text file
# of boxes for each, and a `data.yaml` with the folders of the splits and the names of the classes.


# %%
def draw_data(folder: Path, names: list[str], count: int, seed: int) -> Path:
    """Draws pictures of one or two objects in YOLO's format; a fifth of them are for validation."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        split = "valid" if number % 5 == 0 else "train"
        for kind in ("images", "labels"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        picture = np.full((256, 256, 3), rng.integers(0, 120, 3), np.uint8)
        lines = []
        for _ in range(rng.integers(1, 3)):
            label, radius = int(rng.integers(len(names))), int(rng.integers(35, 80))
            x, y = (int(place) for place in rng.integers(radius, 256 - radius, 2))
            draw_object(picture, names[label], (x, y), radius, rng.integers(140, 256, 3).tolist())
            lines.append(f"{label} {x / 256} {y / 256} {radius / 128} {radius / 128}")
        cv2.imwrite(str(folder / split / "images" / f"{number:04}.jpg"), picture)
        (folder / split / "labels" / f"{number:04}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(f"train: train/images\nval: valid/images\nnames: [{', '.join(names)}]\n")
    return folder


def draw_object(picture: np.ndarray, name: str, place: tuple[int, int], radius: int, colour: list[int]) -> None:
    x, y = place
    if name == "square":
        cv2.rectangle(picture, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    else:
        cv2.circle(picture, place, radius - 5 * (name == "ring"), colour, 10 if name == "ring" else -1)


shapes = draw_data(FOLDER / "shapes", ["disc", "square"], count=500, seed=0)
photos = sorted((shapes / "valid" / "images").iterdir())
Image.open(photos[0])

# %% [markdown]
# `python -m hpr_jax.main check-data --data DIR` counts, checks and draws what a run would see of your own data.
#
# ## Training
#
# A run needs a recipe and data. `ddq.py:demo` is HPR-DDQ made small: three refiners in each decoder layer, where the
# plain detector has one. The settings below shrink it further, to pictures of 64 pixels. `--help-config` explains
# every setting.
#
# A callback hears of the run while it trains, and may end it; this one prints how it goes.

# %%
SMALL = {
    "augmentation.sides": (64,),
    "augmentation.max_side": 64,
    "evaluate.side": 64,
    "evaluate.max_side": 64,
    "model.encoder.layers": 1,
    "model.queries.count": 10,
    "compute.remat": (),
}
LENGTH = {
    "train.steps": STEPS,
    "train.evaluate_every": max(STEPS // 2, 1),
    "train.log_every": max(STEPS // 40, 1),
    "train.plots": False,
    "optimizer.warmup_steps": STEPS // 20,
    "optimizer.milestones": (max(STEPS * 4 // 5, 1),),
}


class Progress(hpr_jax.Callback):
    """Prints the loss five times in a run, and the average precision whenever the detector is evaluated."""

    def on_step(self, step, numbers):
        if step % max(STEPS // 5, 1) == 0:
            print(f"step {step}: loss {numbers['loss']:.1f}")

    def on_evaluation(self, step, result):
        print(f"step {step}: AP {result.metrics['AP']:.3f}, AP50 {result.metrics['AP50']:.3f}")


hybrid = hpr_jax.train(
    "ddq.py:demo", data=shapes, workdir=FOLDER / "hybrid", overrides=SMALL | LENGTH, callbacks=[Progress()]
)

# %% [markdown]
# The result knows the run's folder, its last metrics, and the history of every number that it logged.

# %%
plt.plot(*hybrid.history.series("loss"))
plt.xlabel("step")
plt.ylabel("loss")
plt.show()

# %% [markdown]
# ## Predicting
#
# `hpr_jax.load` takes a run, a checkpoint, a published file of weights, `hf://owner/name`, or a config, which gives
# random weights. A detector takes paths, arrays and Pillow images, one or many, and notebooks show its result as a
# picture.

# %%
detector = hpr_jax.load(hybrid.workdir)
found = detector(photos[0], threshold=0.3)
display(found)

# %%
for name, score, box in zip(found.names, found.scores, found.boxes):
    print(f"{name:8} {score:.2f}  {np.round(box)}")

# %% [markdown]
# ## Looking inside a refiner
#
# A decoder refines queries layer by layer. `explain` follows the query of the best detection: where deformable
# attention samples the picture (dots, the larger the more they weigh), the box in front of each layer (white), and in
# colours what each branch makes of it. The primary branch detects; the other two are the auxiliary refiners, whose
# results it merges into its own.

# %%
detector.explain(photos[0])

# %% [markdown]
# `outputs` has everything that the network computes. Predictions of a branch have the axes layer, image, query: here
# is the best score of each branch behind each layer.

# %%
outputs = detector.outputs(photos[0])
for name, branch in {"primary": outputs.primary, **outputs.branches}.items():
    best = jax.nn.sigmoid(branch.matching.logits).max(axis=(1, 2, 3))
    print(f"{name:20}", *(f"layer {layer}: {score:.2f}" for layer, score in enumerate(best, start=1)))
print("reference boxes:", outputs.intermediates.reference_boxes.shape, "  memory:", outputs.intermediates.memory.shape)

# %% [markdown]
# How much does the primary path take of each path? The weights of the merges are learned, all from 1 on, and logged
# with every evaluation: their mean sizes, behind self-attention and behind the feed-forward network.

# %%
for name in hybrid.history.names("merge/"):
    print(f"{name:45} {hybrid.history.series(name)[1][-1]:.3f}")

# %% [markdown]
# ## Changing a refiner
#
# Which refiners work beside the primary one, and how they are merged, are settings. `describe` tells what a detector
# costs before it is trained.

# %%
hpr_jax.describe(hybrid.workdir)

# %%
VARIANTS: dict[str, dict] = {
    "plain DDQ": {"model.refiner.auxiliaries": ()},
    "dynamic convolution alone": {"model.refiner.auxiliaries": ("dynamic_conv",)},
    "HPR, one weight a path": {"model.refiner.merge": "learned_scalar"},
    "HPR": {},
}
for name, settings in VARIANTS.items():
    cost = hpr_jax.describe("ddq.py:demo", classes=2, overrides=SMALL | settings).total
    print(f"{name:28}{cost.trained:10,} parameters  {cost.flops / 1e9:.3f} GFLOPs")

# %% [markdown]
# The plain detector, trained in the same way:

# %%
plain = hpr_jax.train(
    "ddq.py:demo",
    data=shapes,
    workdir=FOLDER / "plain",
    overrides=SMALL | LENGTH | VARIANTS["plain DDQ"],
    callbacks=[Progress()],
)
for name, run in {"HPR": hybrid, "plain DDQ": plain}.items():
    print(f"{name:10} AP {run.metrics['AP']:.3f}")

# %% [markdown]
# Single runs this short say little about refiners. `scripts/compare_refiners.py` compares them with several seeds, at
# equal steps and at equal time.
#
# ## Fine-tuning
#
# A trained detector learns new classes from few images. `finetune` takes whatever `load` takes; model, losses and
# sizes of images are the detector's, and the recipe is `configs/finetune.py`. Class layers begin anew. The rate of
# that recipe is for detectors that were trained for days, so it is raised here.

# %%
rings = draw_data(FOLDER / "rings", ["ring"], count=100, seed=1)
tuned = hpr_jax.train(
    finetune=hybrid.workdir,
    data=rings,
    workdir=FOLDER / "tuned",
    overrides=LENGTH | {"train.epochs": 0, "data.buckets": 1, "optimizer.learning_rate": 5e-4},
    callbacks=[Progress()],
)
hpr_jax.load(tuned.workdir)(next((rings / "valid" / "images").iterdir()))

# %% [markdown]
# ## The report
#
# `report` writes one page on a run: curves, precision and recall, the errors that cost most, pictures of them,
# doubtful labels and speed.

# %%
page = hpr_jax.report(hybrid.workdir)
IFrame(page, "100%", 600)

# %% [markdown]
# ## Where to go on
#
# - `scripts/tutorial_refiner.py`: a refiner of your own in thirty lines.
# - `hpr_jax.train("ddq.py:small", data="DIR")`: from scratch, on a few hundred pictures of usual size.
# - `hpr_jax.train(finetune="FILE", data="DIR")` with published weights: what to do with pictures of your own and a
#   GPU.
# - The README has the recipes, and how weights come from and go to PyTorch.
