"""Settings that the recipes share. Every value can be overridden on the command line as `--config.section.key=value`.

`--help-config` lists what each setting means; hpr_jax/settings.py has the same table.
"""

from typing import Any

from ml_collections import ConfigDict

# Mean and standard deviation of red, green and blue in ImageNet.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
# The published Deformable DETR and DINO weights were trained with this deviation, in which one digit of red is wrong.
DINO_STD = (58.335, 57.12, 57.375)

# Length of each schedule, and the milestones at which the learning rate falls: in steps of 16 images (COCO has 118,287), and
# in epochs for the recipes that count epochs.
STEPS = {"1x": (88_000, (80_000,)), "2x": (176_000, (117_300, 161_300)), "3x": (264_000, (205_300, 249_300))}
EPOCHS = {"1x": (12, (11,)), "2x": (24, (16, 22))}

# Variants of every detector that train from scratch, on a CPU if need be.
FROM_SCRATCH = ("small", "demo")


def base() -> ConfigDict:
    """What all official recipes have in common (paper, section 4, and the official configs), with ResNet-50."""
    config = ConfigDict()
    config.model = {
        "channels": 256,
        "heads": 8,
        "levels": 4,
        "points": 4,
        "hidden": 2048,
        # Parts that are not trained, some of backbone, neck, encoder, queries, primary and merges. The first stages of the
        # backbone alone are frozen by backbone.frozen_stages.
        "frozen_parts": (),
        "pixel_mean": IMAGENET_MEAN,
        "pixel_std": IMAGENET_STD,
        "backbone": resnet(),
        "neck": {"groups": 32, "bias": False},
        "encoder": {"layers": 6, "position_temperature": 20.0, "position_offset": 0.0},
        # The best 900 proposals, with learned content. Other kinds are distinct, see configs/ddq.py, and positions, see
        # configs/deformable_detr.py.
        "queries": {"kind": "top", "count": 900},
        # At most 100 positive denoising queries; 0: no denoising. views_per_chunk is the number of views on one GPU of the
        # official run: a weak and a strong one of 2 images.
        "denoising": {"queries": 100, "label_noise": 0.5, "box_noise": 1.0, "views_per_chunk": 4},
        "refiner": {
            "layers": 6,
            # The refiners are deformable, dynamic_conv, regional_attention, global_attention, region_fc and point.
            "primary": "deformable",
            "auxiliaries": ("regional_attention", "dynamic_conv"),
            # Paths are merged with fixed, learned_scalar or learned_vector weights, behind some of attention, interaction
            # and ffn.
            "merge": "learned_vector",
            "merge_points": ("attention", "ffn"),
            # Initial weight of each path, the primary one first; (): 1 for all.
            "merge_initial": (),
            # Whether the merge weights are drawn at random instead, as in the published DDQ models.
            "merge_xavier": False,
            # Whether there is a norm in front of the heads; whether a layer's losses reach the layer before it through its
            # boxes, as in DINO; and how far the coordinates of boxes are kept from 0 and 1 before layers move them on, and
            # before the heads make detections of them.
            "final_norm": True,
            "look_forward_twice": True,
            "refine_epsilon": 1e-3,
            "output_epsilon": 1e-5,
            "region": {"strides": (8, 16, 32, 64), "output_size": 7, "sampling_ratio": 2, "finest_scale": 56.0},
            "dynamic_conv": {"hidden": 64},
            "regional_attention": {"heads": 8, "samples": 5, "temperature": 20.0},
            # level: the level of the pyramid that global attention reads; 0 is the finest.
            "global_attention": {"heads": 8, "level": 2, "temperature": 20.0},
            "region_fc": {"hidden": 1024},
        },
    }
    config.compute = {
        # Type of activations: float32 or, on GPUs, bfloat16. Parameters, boxes, predictions and losses are always float32.
        "dtype": "float32",
        # Precision of products of float32 numbers: default, which is TF32 on NVIDIA GPUs, high or highest. The heads, whose
        # scores are ranked, compute in float32 in any case.
        "precision": "default",
        # How sampling, RoIAlign, attention and NMS are computed: by xla, by pallas kernels, or auto: by kernels on NVIDIA
        # GPUs, else by XLA.
        "operations": "auto",
        # Parts whose layers compute their inner values again in the backward pass, some of backbone, encoder and refiner. It
        # takes a quarter of the memory and little time.
        "remat": ("encoder", "refiner"),
    }
    # branch_weight: of all losses of each auxiliary branch; class_weight: of the class losses of matched queries.
    config.loss = {"branch_weight": 0.5, "class_weight": 1.0}
    config.data = {
        # A folder in COCO's, YOLO's or Pascal VOC's format, or the directory of one version of a TFDS data set, which has a
        # dataset_info.json. What it is is recognised, unless the next four settings name other files than COCO's.
        "directory": "data/coco",
        "train_images": "train2017",
        "train_annotations": "annotations/instances_train2017.json",
        "val_images": "val2017",
        "val_annotations": "annotations/instances_val2017.json",
        # Splits of a TFDS directory; a part of a split is written like train[:90%].
        "train_split": "train",
        "val_split": "validation",
        # Where the data has one split: so much of the images is validated on, chosen by a hash of their file names.
        "val_fraction": 0.2,
        # Of samples that are stored in 16 bits so many are used, and the upper 8 of these are kept: 12, for example, where
        # an instrument stores 12 bits in 16.
        "image_bits": 16,
        # Images without objects, and images with a side below min_side pixels, are left out of training.
        "keep_empty": False,
        "min_side": 32,
        # Images of classes that a smaller part of the images shows are taken more often in an epoch (LVIS); 0: none are.
        "repeat_threshold": 0.0,
        # Ground-truth boxes that a view has room for; 0: as many as the fullest training image has, and as can be pasted.
        "max_boxes": 0,
        # Number of static image shapes. They are chosen so that little is padded, and each is compiled once. By
        # scripts/benchmarks/buckets.py, padding adds a third of the pixels with 6 shapes, a fifth with 12, an eighth with
        # 24.
        "buckets": 12,
        # Processes that load training batches; 0: threads of this process load them, as in evaluation. The batches are the
        # same. As many as there are cores to spare are best; each has a copy of the annotations.
        "workers": 0,
        "threads": 4,
        # Seconds to wait for a folder of images that cannot be reached any more, as happens on networks, before the run is
        # saved and ends.
        "patience": 600.0,
    }
    config.augmentation = detr_augmentation()
    config.train = {
        # Images on all devices together. auto: as many as there is memory for, see optimizer.recipe_batch_size.
        "batch_size": 16,
        # Gradient accumulation: a device computes its images in so many parts, one after the other. That saves memory, and
        # costs a second forward pass of all parts but the last. The result is the same, as losses have the normalisers of
        # the whole batch.
        "accumulation_steps": 1,
        # What solves the matching problems: scipy on the host, a pallas kernel, or auto: the kernel on NVIDIA GPUs, else
        # SciPy. The result is the same.
        "matching": "auto",
        # Decay of an exponential moving average of the weights, e.g. 0.9997, which is then evaluated; 0: no average.
        "ema_decay": 0.0,
        # Length in steps, or if that is 0 in epochs. evaluate_every and the optimizer's milestones count the same.
        "steps": 0,
        "epochs": 0,
        "seed": 0,
        "log_every": 50,
        "checkpoint_every": 1000,
        "keep_checkpoints": 2,
        "evaluate_every": 8000,
        # The best checkpoint is that of the best AP, AP50, AP75, AP_small, AP_medium, AP_large or AR. The run ends early
        # when so many evaluations in a row (patience; 0: never) together gain no more than min_gain in it.
        "best_metric": "AP",
        "patience": 0,
        "min_gain": 0.0,
        # Pictures of the first batch, labels, curves and predictions: in plots/ below the workdir, and in TensorBoard.
        "plots": True,
        # A project of Weights & Biases that gets the numbers, too; it wants the extra `log`.
        "wandb": "",
        # Weights to start from: a checkpoint, workdir or published folder of this project, hf://owner/name of one on the
        # Hugging Face hub, or a .pth, .npz or .safetensors file of an official detector or of a backbone. The number of
        # classes may differ. `random` asks for random weights; empty, for pre-trained weights of the backbone from data/
        # or torch's hub cache.
        "initial_weights": "",
    }
    config.optimizer = {
        "learning_rate": 1e-4,
        # The batch size that the learning rate is made for. It changes nothing; where train.batch_size is auto, the log says
        # how far the batch is from it.
        "recipe_batch_size": 16,
        "backbone_multiplier": 0.1,
        # The weights of the merges may learn faster than the rest, and keep their size.
        "merge_multiplier": 1.0,
        "merge_decay": True,
        # The layers that say where deformable attention samples may learn more slowly.
        "offsets_multiplier": 1.0,
        "weight_decay": 1e-4,
        "clip_norm": 0.1,
        "warmup_steps": 0,
        "warmup_factor": 1e-4,
        # The rate falls by gamma at the milestones, or, with the schedule `cosine`, slowly to gamma of it at the end.
        "schedule": "milestones",
        "milestones": (),
        "gamma": 0.1,
    }
    config.evaluate = {"batch_size": 1, "side": 800, "max_side": 1333, "detections": 300, "buckets": 6}
    # Side of a square grey canvas that images lie on, and that counts as image; 0: no canvas.
    config.evaluate.canvas = 0
    # What computes AP: pycocotools (the reference), hotcoco (the same numbers, faster), or auto: hotcoco if it is installed.
    config.evaluate.evaluator = "auto"
    # How many detections of an image and a class AP and AR take; with (100, 300, 1000) their numbers are mmdetection's.
    config.evaluate.max_detections = (1, 10, 100)
    return config


def resnet() -> dict[str, Any]:
    """ResNet-50 for pre-trained weights: BatchNorm, stem and first stage are frozen."""
    return {
        "kind": "resnet",
        "blocks": (3, 4, 6, 3),
        "base_channels": 64,
        "norm": "frozen_batch",
        # The first stage whose map becomes a level of the pyramid; 0 is that of stride 4.
        "first_map": 1,
        "frozen_stages": 1,
    }


def swin_l() -> dict[str, Any]:
    """Swin-L for weights pre-trained on ImageNet-22K at 384 pixels (Liu et al. 2021)."""
    return {
        "kind": "swin",
        "embed_channels": 192,
        "depths": (2, 2, 18, 2),
        "heads": (6, 12, 24, 48),
        "window": 12,
        "drop_path": 0.2,
        "first_map": 0,
        "frozen_stages": -1,
    }


def detr_augmentation() -> dict[str, Any]:
    """The section `augmentation`, of kind `detr`.

    Kind `detr` flips, and then either resizes, or resizes, crops and resizes (DETR, Carion et al. 2020, section A.4). Kind
    `lsj` is large-scale jitter onto a grey canvas, and copy-paste, which needs masks (Ghiasi et al. 2021).
    """
    return {
        "kind": "detr",
        # Data re-augmentation (paper section 3.2): a batch has a weak and a strong view of each image.
        "strong_views": True,
        # As published, objects that a strong view moves out of sight keep a box without area at the border. True drops them.
        "drop_vanished": False,
        "flip": 0.5,
        "sides": tuple(range(480, 801, 32)),
        "max_side": 1333,
        "crop": 0.5,
        "crop_sides": (400, 500, 600),
        "crop_range": (384, 600),
        "lsj": {"side": 1024, "scale_range": (0.1, 2.0), "copy_paste": True},
    }


def set_variant(config: ConfigDict, variant: str, *, in_epochs: bool = False) -> None:
    """Changes a config to a variant: one of `FROM_SCRATCH`, an official recipe `{r50|swin_l}_{1x|2x|3x}[_lsj]`, or a plain
    detector `plain_{r50|swin_l}[_5scale]`, or HPR that begins as one, `from_plain_...`.

    Args:
      in_epochs: lengths of recipes with ResNet-50 and without LSJ count epochs.
    """
    if variant in FROM_SCRATCH:
        _from_scratch(config, variant)
    elif variant.startswith("plain_"):
        _plain(config, variant)
    elif variant.startswith("from_plain_"):
        _from_plain(config, variant)
    else:
        _recipe(config, variant, in_epochs)


def _recipe(config: ConfigDict, variant: str, in_epochs: bool) -> None:
    lsj = variant.endswith("_lsj")
    backbone, _, length = variant.removesuffix("_lsj").rpartition("_")
    if backbone == "swin_l":
        config.model.backbone = swin_l()
        config.compute.remat = ("backbone", "encoder", "refiner")
        config.model.neck.bias = True
        # As published, RoIAlign assumes the strides of ResNet's maps (8, 16, 32, 64), which are twice those of Swin's maps.
        # Right would be config.model.refiner.region.strides=(4,8,16,32).
    if lsj:
        config.augmentation.kind = "lsj"
        config.data.keep_empty = True
        # As published, whether or not a recipe sets `use_lsj`: trained and tested on grey canvases that count as image.
        config.evaluate.update(side=1024, max_side=1024, canvas=1024)
    if lsj or backbone == "swin_l":
        config.model.denoising.views_per_chunk = 2
    if in_epochs and backbone == "r50" and not lsj:
        config.train.epochs, config.optimizer.milestones = EPOCHS[length]
        config.train.evaluate_every = 1
    else:
        config.train.steps, config.optimizer.milestones = STEPS[length]


def _plain(config: ConfigDict, variant: str) -> None:
    """Changes a config to a detector that mmdetection publishes, with its recipe of 12 epochs: one refiner, weak views."""
    config.model.refiner.auxiliaries = ()
    config.model.queries.count = 900
    config.model.pixel_std = IMAGENET_STD
    config.model.denoising.views_per_chunk = 2
    config.augmentation.strong_views = False
    config.data.keep_empty = True
    config.train.epochs, config.optimizer.milestones = EPOCHS["1x"]
    config.train.evaluate_every = 1
    strides: tuple[int, ...] = (8, 16, 32, 64)
    if "swin_l" in variant:
        config.model.backbone = swin_l()
        config.compute.remat = ("backbone", "encoder", "refiner")
    if variant.endswith("_5scale"):
        strides = (4, *strides)
    config.model.backbone.first_map = 5 - len(strides)
    config.model.levels, config.model.refiner.region.strides = len(strides), strides


def _from_plain(config: ConfigDict, variant: str) -> None:
    """Changes a config to HPR with the queries, levels and pixel_std of a plain detector, as which it begins.

    Merges begin with the primary path alone. At the rate of the other weights they would hardly leave that.
    """
    auxiliaries = config.model.refiner.auxiliaries
    _plain(config, variant.removeprefix("from_"))
    config.model.refiner.auxiliaries = auxiliaries
    config.model.refiner.update(merge_initial=(1.0,) + (0.0,) * len(auxiliaries), merge_xavier=False)
    config.model.denoising.views_per_chunk = 4
    config.augmentation.strong_views = True
    config.optimizer.update(merge_multiplier=10.0, merge_decay=False)


def _from_scratch(config: ConfigDict, variant: str) -> None:
    """Changes a config to `small` or `demo`: a narrow detector that needs no pre-trained weights.

    All layers of its backbone are trained, with GroupNorm and the full learning rate, and on weak views alone.
    """
    config.model.backbone.update(norm="group", frozen_stages=-1)
    config.model.refiner.merge_xavier = False
    config.model.pixel_std = IMAGENET_STD
    config.optimizer.backbone_multiplier = 1.0
    config.augmentation.update(strong_views=False, drop_vanished=True)
    {"small": _small, "demo": _demo}[variant](config)


def _small(config: ConfigDict) -> None:
    """For a few hundred images of about 320 to 480 pixels. The detector has a thirteenth of the parameters, and a step takes
    about a second for each image on two CPU cores."""
    model = config.model
    model.backbone.update(base_channels=32, blocks=(2, 2, 2, 2))
    model.update(channels=128, heads=4, hidden=512)
    model.encoder.layers = model.refiner.layers = 2
    model.neck.groups = 16
    model.queries.count = 80
    model.denoising.queries = min(model.denoising.queries, 30)
    model.refiner.dynamic_conv.hidden = 32
    model.refiner.regional_attention.update(heads=4, samples=3)
    config.augmentation.update(sides=(320, 352, 384), max_side=512, crop_sides=(320, 360, 400), crop_range=(224, 384))
    config.data.update(buckets=2, keep_empty=True)
    config.train.update(batch_size=2, steps=6000, checkpoint_every=200, evaluate_every=1000, log_every=20)
    config.optimizer.update(learning_rate=4e-4, weight_decay=1e-3, warmup_steps=100, milestones=(5000,))
    config.optimizer.recipe_batch_size = 2
    config.evaluate.update(batch_size=4, side=352, max_side=512, detections=100, buckets=2)


def _demo(config: ConfigDict) -> None:
    """For images of 128 pixels; trains in a few minutes on two CPU cores."""
    model = config.model
    model.backbone.update(base_channels=16, blocks=(1, 1, 1, 1))
    model.update(channels=64, heads=4, hidden=128)
    model.encoder.layers = model.refiner.layers = 2
    model.neck.groups = 8
    model.queries.count = 20
    model.denoising.queries = min(model.denoising.queries, 10)
    model.refiner.region.output_size = 5
    model.refiner.dynamic_conv.hidden = 16
    model.refiner.regional_attention.update(heads=4, samples=2)
    config.augmentation.update(sides=(128,), max_side=128, crop=0.0)
    config.data.update(directory="runs/demo/data", buckets=1, keep_empty=True, threads=2)
    # All detectors train for about the same time: steps with dense or denoising queries cost more, so there are fewer.
    steps = 1000 if model.queries.kind == "distinct" else 2000 if model.denoising.queries else 3000
    config.train.update(batch_size=8, steps=steps, checkpoint_every=250, evaluate_every=steps // 2, log_every=20)
    config.optimizer.update(learning_rate=1e-3, weight_decay=1e-3, warmup_steps=50, milestones=(steps * 4 // 5,))
    config.optimizer.recipe_batch_size = 8
    config.evaluate.update(batch_size=8, side=128, max_side=128, detections=50, buckets=1)
