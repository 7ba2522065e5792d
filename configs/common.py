"""Settings that the recipes share. Every value can be overridden on the command line as `--config.section.key=value`."""

from ml_collections import ConfigDict

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


def base() -> ConfigDict:
    """What all official R50 recipes have in common (paper section 4.1 and its configs)."""
    config = ConfigDict()
    config.model = {
        "channels": 256,
        "heads": 8,
        "levels": 4,
        "points": 4,
        "hidden": 2048,
        # Compute the inner values of transformer layers again in the backward pass: a quarter of the memory, little time.
        "remat": True,
        "pixel_mean": IMAGENET_MEAN,
        "pixel_std": IMAGENET_STD,
        "backbone": resnet(),
        "neck": {"groups": 32, "bias": False},
        "encoder": {"layers": 6, "position_temperature": 20.0, "position_offset": 0.0},
        # views_per_chunk: the views on one GPU of the official run (2 images, weak and strong).
        "denoising": {"queries": 100, "label_noise": 0.5, "box_noise": 1.0, "views_per_chunk": 4},
        "refiner": {
            "layers": 6,
            "primary": "deformable",
            "auxiliaries": ("regional_attention", "dynamic_conv"),
            "merge": "learned_vector",
            # Initial weight of each path, the primary one first; (): one for all.
            "merge_initial": (),
            # Draw the merge weights at random instead, as the initialisation of the published DDQ models does.
            "merge_xavier": False,
            "region": {"strides": (8, 16, 32, 64), "output_size": 7, "sampling_ratio": 2, "finest_scale": 56.0},
            "dynamic_conv": {"hidden": 64},
            "regional_attention": {"heads": 8, "samples": 5, "temperature": 20.0},
        },
    }
    config.loss = {"branch_weight": 0.5}
    config.data = {
        "directory": "data/coco",
        "train_images": "train2017",
        "train_annotations": "annotations/instances_train2017.json",
        "val_images": "val2017",
        "val_annotations": "annotations/instances_val2017.json",
        # Images without objects, and those with a side below this, are left out of training.
        "keep_empty": False,
        "min_side": 32,
        # Ground-truth boxes an image has room for; 0: as many as the fullest training image has.
        "max_boxes": 0,
        # Static image shapes, chosen by the plan to waste little padding; each is compiled once.
        "buckets": 6,
        "threads": 4,
    }
    config.augmentation = detr_augmentation()
    config.train = {
        "batch_size": 16,
        "steps": 0,
        "seed": 0,
        "log_every": 50,
        "checkpoint_every": 1000,
        "keep_checkpoints": 2,
        "evaluate_every": 8000,
        # .npz with official names: a whole detector, or a backbone alone (names below `backbone.`).
        "initial_weights": "",
    }
    config.optimizer = {
        "learning_rate": 1e-4,
        "backbone_multiplier": 0.1,
        "weight_decay": 1e-4,
        "clip_norm": 0.1,
        "warmup_steps": 0,
        "warmup_factor": 1e-4,
        "milestones": (),
        "gamma": 0.1,
    }
    config.evaluate = {"batch_size": 1, "side": 800, "max_side": 1333, "detections": 300, "buckets": 6}
    # pycocotools (the reference), hotcoco (the same numbers, faster), or auto: the faster one if it is installed.
    config.evaluate.evaluator = "auto"
    return config


def resnet() -> dict:
    """ResNet-50 for pre-trained weights: BatchNorm frozen, stem and first stage too."""
    return {
        "kind": "resnet",
        "blocks": (3, 4, 6, 3),
        "base_channels": 64,
        "norm": "frozen_batch",
        "frozen_stages": 1,
        "remat": False,
    }


def detr_augmentation() -> dict:
    """Flip, then one of: resize; resize, crop, resize (DETR, Carion et al. 2020, section A.4)."""
    return {
        "flip": 0.5,
        "sides": tuple(range(480, 801, 32)),
        "max_side": 1333,
        "crop": 0.5,
        "crop_sides": (400, 500, 600),
        "crop_range": (384, 600),
    }


def from_scratch(config: ConfigDict, *, base_channels: int, blocks: tuple[int, ...]) -> None:
    """A backbone that needs no pre-trained weights: all layers trained, GroupNorm over valid pixels, full learning rate."""
    config.model.backbone.update(blocks=blocks, base_channels=base_channels, norm="group", frozen_stages=-1)
    config.optimizer.backbone_multiplier = 1.0
