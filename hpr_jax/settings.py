"""Every setting of a config: what it means, and which values it may have. Imports no JAX.

`check` and `--help-config` both come from the table `SETTINGS`; `check` also knows the conditions between settings. The
values are in configs/common.py and the config files beside it.
"""

import dataclasses
import difflib
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hpr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Setting:
    """What one setting means, and which values it may have.

    Attributes:
      meaning: one or two sentences for `--help-config`.
      kind: type of the value, or of each item of a list: float (any number), int (whole numbers), bool or str.
      many: whether the value is a list.
      at_least, above, at_most, below: bounds of a number, or of each number in a list; None where there is no bound.
      choices: the words that a text, or each text in a list, may be; empty where it may be any.
      unknown: what a sentence about any other word ends with, where no choice is near it.
      word: a text that a number may be in place of one; "" where it may not.
      length: how many items a list must have; None where it may have any number of them.
      nonempty: whether a list must have at least one item.
    """

    meaning: str
    kind: type = float
    many: bool = False
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: Sequence[str] = ()
    unknown: str = ""
    word: str = ""
    length: int | None = None
    nonempty: bool = False

    def bounds(self) -> str:
        """The bounds in words, like `at least 0 and below 1`, with the word that may take a number's place; '' if there are
        none."""
        parts = [
            f"{words} {bound}"
            for words, bound in (
                ("at least", self.at_least),
                ("above", self.above),
                ("at most", self.at_most),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " and ".join(parts) + (f", or {self.word}" if self.word else "")

    def wanted(self) -> str:
        """What values are, in words, like `a list of whole numbers`."""
        one, some = {
            float: ("a number", "numbers"),
            int: ("a whole number", "whole numbers"),
            bool: ("True or False", "truths"),
            str: ("a text", "names"),
        }[self.kind]
        return f"a list of {some}" if self.many else f"{one} or {self.word}" if self.word else one

    def is_of_type(self, item: Any) -> bool:
        """Whether the value, or an item of a list, has the right type."""
        if self.word and item == self.word:
            return True
        if self.kind in (bool, str):
            return isinstance(item, self.kind)
        return isinstance(item, numbers.Integral if self.kind is int else numbers.Real) and not isinstance(item, bool)

    def allows(self, number: float) -> bool:
        """Whether a number is finite and within the bounds."""
        try:
            finite = math.isfinite(number)
        except OverflowError:
            # A whole number that no float can hold.
            return False
        return (
            finite
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


# What there are more of than this fits no machine. Steps may be so many times more.
MOST, MOST_STEPS = 1_000_000, 1_000_000_000


def _count(meaning: str) -> Setting:
    """A number of things, of which there must be at least one."""
    return Setting(meaning, int, at_least=1, at_most=MOST)


def _steps(meaning: str, at_least: int = 1) -> Setting:
    """A number of steps or epochs."""
    return Setting(meaning, int, at_least=at_least, at_most=MOST_STEPS)


def _counts(meaning: str, length: int | None = None) -> Setting:
    """A list of such numbers, which must not be empty."""
    return Setting(meaning, int, many=True, at_least=1, at_most=MOST, length=length, nonempty=True)


def _probability(meaning: str) -> Setting:
    return Setting(meaning, at_least=0, at_most=1)


def _weight(meaning: str) -> Setting:
    return Setting(meaning, at_least=0)


# The refiners that settings may name: those of this package, and those that `hpr_jax.register_refiner` adds.
REFINERS = ["deformable", "dynamic_conv", "regional_attention", "global_attention", "region_fc", "point"]
# What to say of a refiner that is not among them.
UNKNOWN_REFINER = "import the file that registers it with hpr_jax.register_refiner first, or give it as --config"
# Other words that settings may name.
MERGES = ("fixed", "learned_scalar", "learned_vector")
MERGE_POINTS = ("attention", "interaction", "ffn")
DTYPES = ("float32", "bfloat16")
OPERATIONS = ("auto", "xla", "pallas")
MATCHING = ("auto", "scipy", "pallas")
PARTS = ("backbone", "neck", "encoder", "queries", "primary", "merges")
REMAT = ("backbone", "encoder", "refiner")
PRECISIONS = ("default", "high", "highest")
AUGMENTATIONS = ("detr", "lsj")
EVALUATORS = ("auto", "hotcoco", "pycocotools")
BEST_METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR")
# The value of train.initial_weights that asks for random weights.
RANDOM = "random"
# The value of train.batch_size that asks for the largest batch for which there is memory.
AUTO = "auto"

MODEL = {
    "channels": _count("Channels of tokens and queries."),
    "heads": _count("Attention heads of encoder and decoder; they divide the channels."),
    "levels": _count("Levels of the feature pyramid."),
    "points": _count("Sampling points of each head on each level, in deformable attention."),
    "hidden": _count("Hidden channels of the feed-forward networks."),
    "frozen_parts": Setting(
        "Parts that are not trained; queries: the initial ones; primary: the primary refiner's path, heads and norms; "
        "merges: the weights that merge refiners.",
        str,
        many=True,
        choices=PARTS,
    ),
    "pixel_mean": Setting(
        "Mean of red, green and blue, from 0 to 255, that is subtracted from images.", many=True, length=3
    ),
    "pixel_std": Setting(
        "Standard deviation of red, green and blue by which images are divided.", many=True, above=0, length=3
    ),
    "backbone.kind": Setting("Kind of backbone.", str, choices=("resnet", "swin")),
    "backbone.blocks": _counts("Residual blocks in each stage (resnet)."),
    "backbone.base_channels": Setting("Channels of the stem (resnet).", int, at_least=4),
    "backbone.norm": Setting(
        "Norms: frozen_batch for pre-trained weights, group to train from scratch (resnet).",
        str,
        choices=("frozen_batch", "group"),
    ),
    "backbone.frozen_stages": Setting(
        "Stages that are not trained: -1 none, 0 the stem or patch embedding, 1 also the first stage, ...",
        int,
        at_least=-1,
        at_most=4,
    ),
    "backbone.first_map": Setting(
        "The backbone's first stage whose map becomes a level, from 0 (stride 4) on.", int, at_least=0, at_most=3
    ),
    "backbone.embed_channels": _count("Channels of the patch embedding (swin)."),
    "backbone.depths": _counts("Blocks in each stage (swin)."),
    "backbone.heads": _counts("Attention heads in each stage (swin)."),
    "backbone.window": _count("Side of the attention windows in tokens (swin)."),
    "backbone.drop_path": Setting("Rate of stochastic depth in the last block (swin).", at_least=0, below=1),
    "neck.groups": _count("Groups of the norms behind the backbone."),
    "neck.bias": Setting("Whether the convolutions behind the backbone have a bias.", bool),
    "encoder.layers": _count("Layers of the encoder."),
    "encoder.position_temperature": Setting("Temperature of the sine position encoding.", above=0),
    "encoder.position_offset": Setting("Offset of pixel numbers in the sine position encoding."),
    "queries.kind": Setting(
        "top: the proposals of the best score, with learned content; positions: with content from their boxes (two-stage "
        "Deformable DETR); distinct: those that survive NMS (DDQ).",
        str,
        choices=("top", "positions", "distinct"),
    ),
    "queries.count": _count("Matching queries."),
    "queries.dense_ratio": Setting("Dense queries in training, as a multiple of the matching queries (distinct).", above=0),
    "queries.nms_threshold": _probability("IoU above which a query suppresses another (distinct)."),
    "denoising.queries": Setting(
        "Most positive denoising queries in training; 0: no denoising.", int, at_least=0, at_most=MOST
    ),
    "denoising.label_noise": _probability("Twice the probability that a denoising query has a random label."),
    "denoising.box_noise": Setting("Scale of the noise on boxes of denoising queries.", at_least=0),
    "denoising.views_per_chunk": _count(
        "Views whose fullest one decides the number of denoising groups: those on one GPU of the official run."
    ),
    "refiner.layers": _count("Layers of the decoder."),
    "refiner.primary": Setting(
        "The refiner whose result goes on to the next layer.", str, choices=REFINERS, unknown=UNKNOWN_REFINER
    ),
    "refiner.auxiliaries": Setting(
        "Refiners beside the primary one; () is the plain detector.",
        str,
        many=True,
        choices=REFINERS,
        unknown=UNKNOWN_REFINER,
    ),
    "refiner.merge": Setting(
        "Weights of the merge: fixed, or one learned per path, or per channel and path.", str, choices=MERGES
    ),
    "refiner.merge_points": Setting("Parts of a path behind which paths are merged.", str, many=True, choices=MERGE_POINTS),
    "refiner.merge_initial": Setting("Initial weight of each path, the primary one first; (): 1 for all.", many=True),
    "refiner.merge_xavier": Setting("Draw the initial merge weights at random, as the published DDQ models do.", bool),
    "refiner.final_norm": Setting("Whether there is a norm in front of the heads.", bool),
    "refiner.look_forward_twice": Setting(
        "Whether a layer's losses reach the layer before it through its boxes, as in DINO.", bool
    ),
    "refiner.refine_epsilon": Setting(
        "Coordinates of boxes are kept so far from 0 and 1 before layers move them.", above=0, below=0.5
    ),
    "refiner.output_epsilon": Setting(
        "Coordinates of boxes are kept so far from 0 and 1 before heads move them.", above=0, below=0.5
    ),
    "refiner.region.strides": _counts("Stride of each level in pixels, as RoIAlign assumes it."),
    "refiner.region.output_size": _count("Bins of a region along each side."),
    "refiner.region.sampling_ratio": _count("Samples of a bin along each side."),
    "refiner.region.finest_scale": Setting(
        "Boxes with sides below twice this many pixels take their region from the finest level.", above=0
    ),
    "refiner.dynamic_conv.hidden": _count("Hidden channels of dynamic convolution."),
    "refiner.regional_attention.heads": _count("Attention heads of regional attention; they divide the channels."),
    "refiner.regional_attention.samples": _count("Queries that each query spawns for its region."),
    "refiner.regional_attention.temperature": Setting("Temperature of the position encoding of regions.", above=0),
    "refiner.global_attention.heads": _count("Attention heads of global attention; they divide the channels."),
    "refiner.global_attention.level": Setting("Level that global attention reads, 0 the finest.", int, at_least=0),
    "refiner.global_attention.temperature": Setting("Temperature of its position encoding.", above=0),
    "refiner.region_fc.hidden": _count("Hidden channels of the fully connected layers on regions."),
}
COMPUTE = {
    "dtype": Setting(
        "Type of activations; bfloat16 is for GPUs. Parameters, boxes, predictions and losses are float32.",
        str,
        choices=DTYPES,
    ),
    "precision": Setting(
        "Of products of float32 numbers: default is TF32 on NVIDIA GPUs, high about float32, highest float32 itself, seven "
        "times as slow. Scores and boxes are computed in float32 in any case.",
        str,
        choices=PRECISIONS,
    ),
    "operations": Setting(
        "Sampling, RoIAlign, attention and NMS: auto takes Pallas kernels on NVIDIA GPUs and XLA elsewhere.",
        str,
        choices=OPERATIONS,
    ),
    "remat": Setting(
        "Parts whose layers compute their inner values again in the backward pass, to save memory.",
        str,
        many=True,
        choices=REMAT,
    ),
}
LOSS = {
    "branch_weight": _weight("Weight of the losses of each auxiliary branch."),
    "class_weight": _weight("Weight of the class losses of matching queries, denoising queries and proposals."),
    "dense.positives": _count("Dense queries matched with one box."),
    "dense.giou_weight": _weight("Weight of the GIoU loss of dense queries."),
    "dense.alpha": _weight("Exponent of the score in the alignment of dense queries."),
    "dense.beta": _weight("Exponent of the IoU in the alignment of dense queries."),
    "aligned.repeats": _counts("Queries matched with one box, in each decoder layer."),
    "aligned.proposal_repeats": _count("Proposals matched with one box."),
    "aligned.alpha": _probability("Exponent of the score, against the IoU, in a class target."),
    "aligned.gamma": _weight("Focus on hard negatives."),
    "aligned.tau": Setting("Ranks after which the weight of a query falls to 1/e.", above=0),
}
DATA = {
    "directory": Setting(
        "A folder of data in the format of COCO, YOLO or Pascal VOC, or the directory of one version of a TFDS data set; "
        "which of these it is is recognised.",
        str,
    ),
    "train_images": Setting("Folder of the training images, below the directory.", str),
    "train_annotations": Setting("COCO annotations of the training images, below the directory.", str),
    "val_images": Setting("Folder of the validation images, below the directory.", str),
    "val_annotations": Setting("COCO annotations of the validation images, below the directory.", str),
    "train_split": Setting("Training split of a TFDS directory; a part is written train[:90%].", str),
    "val_split": Setting("Validation split of a TFDS directory.", str),
    "val_fraction": Setting(
        "Part of the images that is validated on and not trained on, by a hash of their file names, where the data was "
        "recognised and has one split.",
        above=0,
        below=1,
    ),
    "image_bits": Setting(
        "Bits that samples use where images store them in 16; the upper 8 of these are kept.", int, at_least=8, at_most=16
    ),
    "keep_empty": Setting("Whether images without objects are trained on.", bool),
    "min_side": Setting("Shortest side in pixels of images that are trained on.", int, at_least=0, at_most=MOST),
    "repeat_threshold": Setting(
        "Images of classes that a smaller part of the images shows are taken more often: of a class that a part f shows, "
        "sqrt(repeat_threshold / f) times. 0: all images are taken once.",
        at_least=0,
        at_most=1,
    ),
    "max_boxes": Setting(
        "Ground-truth boxes that a view has room for; 0: as many as the fullest image needs.", int, at_least=0, at_most=MOST
    ),
    "buckets": _count("Static shapes to which training images are padded; each is compiled once."),
    "workers": Setting(
        "Processes that load training batches, which stay the same; 0: threads of this process.",
        int,
        at_least=0,
        at_most=1000,
    ),
    "threads": _count("Threads that load images, of this process or of each worker."),
    "patience": Setting(
        "Seconds to wait for a folder of images that cannot be reached any more, before the run is saved and ends.",
        at_least=0,
        at_most=MOST_STEPS,
    ),
}
AUGMENTATION = {
    "kind": Setting("detr: flip, resize, crop; lsj: large-scale jitter and copy-paste.", str, choices=AUGMENTATIONS),
    "strong_views": Setting(
        "Whether a batch has a strong view beside each weak one (the paper's data re-augmentation).", bool
    ),
    "drop_vanished": Setting(
        "Whether objects that a strong view moves out of sight are dropped; as published they stay.", bool
    ),
    "flip": _probability("Probability of a flip."),
    "sides": _counts("Shorter sides in pixels, one of which is drawn for each image (detr)."),
    "max_side": _count("Longest side in pixels (detr)."),
    "crop": _probability("Probability of a crop (detr)."),
    "crop_sides": _counts("Shorter sides in pixels, one of which an image has when it is cropped (detr)."),
    "crop_range": _counts("Smallest and largest side of a crop in pixels (detr).", 2),
    "lsj.side": _count("Side of the square grey canvas in pixels (lsj)."),
    "lsj.scale_range": Setting("Smallest and largest scale (lsj).", many=True, above=0, length=2),
    "lsj.copy_paste": Setting("Whether objects of other images are pasted, which needs masks (lsj).", bool),
}
TRAIN = {
    "batch_size": dataclasses.replace(
        _count(
            "Images of a batch, on all devices together. auto: the largest batch whose step fits 0.9 of the memory that is "
            "free, and of which an epoch has ten; it is chosen once, when a run begins, and changes no other setting."
        ),
        word=AUTO,
    ),
    "matching": Setting(
        "What solves the matching problems: auto takes a Pallas kernel on NVIDIA GPUs, and SciPy elsewhere.",
        str,
        choices=MATCHING,
    ),
    "accumulation_steps": _count("Parts of a batch that a device computes one after the other, to save memory."),
    "ema_decay": Setting("Decay of a moving average of the weights, which is then evaluated; 0: none.", at_least=0, below=1),
    "steps": _steps("Length in steps; 0: the length is in epochs.", 0),
    "epochs": _steps("Length in epochs; 0: the length is in steps.", 0),
    "seed": Setting("Seed of weights, data and noise.", int, at_least=0, below=2**31),
    "log_every": _steps("Steps between two lines of the log."),
    "checkpoint_every": _steps("Steps between two checkpoints."),
    "keep_checkpoints": _count("Checkpoints that are kept, beside the best one."),
    "evaluate_every": _steps("Steps, or epochs where the length is in epochs, between two evaluations."),
    "best_metric": Setting(
        "Metric of the best checkpoint, and of early stopping; AR is that with the most detections.",
        str,
        choices=BEST_METRICS,
    ),
    "patience": Setting(
        "Evaluations in a row that may gain no more than min_gain together; then the run ends early. 0: it never does.",
        int,
        at_least=0,
        at_most=MOST,
    ),
    "min_gain": _probability("Gain of the metric below which evaluations try the patience."),
    "wandb": Setting("Project of Weights & Biases that the numbers are sent to, too (extra log); '': none.", str),
    "plots": Setting("Whether the run leaves pictures of its data, curves and predictions in plots/.", bool),
    "initial_weights": Setting(
        "Weights to start from: a checkpoint, workdir or published folder, hf://owner/name of one on the Hugging Face hub, "
        "or a .pth, .npz or .safetensors file of a detector or a backbone; random: none; "
        "'': pre-trained weights of the backbone from data/ or torch's hub cache, where the backbone needs them.",
        str,
    ),
}
OPTIMIZER = {
    "learning_rate": Setting("Learning rate of AdamW.", at_least=0),
    "recipe_batch_size": _count(
        "Images of the batches that the learning rate and the length in steps are made for. It is told where "
        "train.batch_size is auto, and changes nothing."
    ),
    "backbone_multiplier": Setting("Factor of the backbone's learning rate.", at_least=0),
    "merge_multiplier": Setting("Factor of the learning rate of the weights that merge refiners.", at_least=0),
    "merge_decay": Setting("Whether the weights that merge refiners decay, too.", bool),
    "offsets_multiplier": Setting(
        "Factor of the learning rate of the layers that say where deformable attention samples.", at_least=0
    ),
    "weight_decay": Setting("Weight decay of AdamW.", at_least=0),
    "clip_norm": Setting("Largest norm of all gradients together; longer ones are scaled down.", above=0),
    "warmup_steps": _steps("Steps of the linear warm-up.", 0),
    "warmup_factor": _probability("Factor of the learning rate at the first step of the warm-up."),
    "milestones": Setting(
        "Steps, or epochs where the length is in epochs, at which the learning rate falls.",
        int,
        many=True,
        at_least=1,
        at_most=MOST_STEPS,
    ),
    "gamma": Setting("Factor by which the learning rate falls.", above=0, at_most=1),
    "schedule": Setting(
        "How the learning rate falls: by gamma at each of the milestones, or along a cosine from the end of the warm-up to "
        "gamma times the rate at the end.",
        str,
        choices=("milestones", "cosine"),
    ),
}
EVALUATE = {
    "batch_size": _count("Images of a batch on each device."),
    "side": _count("Shorter side in pixels to which images are resized."),
    "max_side": _count("Longest side in pixels."),
    "detections": _count("Detections of an image."),
    "buckets": _count("Static shapes to which images are padded."),
    "canvas": Setting(
        "Side of a square grey canvas that images lie on and that counts as image; 0: none.", int, at_least=0, at_most=MOST
    ),
    "max_detections": _counts(
        "Detections of an image and a class that AP and AR take, three numbers: AP takes 100 if it is among them, AR each, "
        "and other numbers the last; (100, 300, 1000) gives those of mmdetection.",
        3,
    ),
    "evaluator": Setting(
        "What counts AP: pycocotools, hotcoco (faster), or auto: the faster one there is.", str, choices=EVALUATORS
    ),
}
SECTIONS: dict[str, dict[str, Setting]] = {
    "model": MODEL,
    "compute": COMPUTE,
    "loss": LOSS,
    "data": DATA,
    "augmentation": AUGMENTATION,
    "train": TRAIN,
    "optimizer": OPTIMIZER,
    "evaluate": EVALUATE,
}
# Every setting, by its dotted key.
SETTINGS = {f"{section}.{key}": setting for section, settings in SECTIONS.items() for key, setting in settings.items()}


def suggestion(word: str, known: Iterable[object], compared: Callable[[str], str] = str) -> str:
    """The end of a sentence about an unknown word: `did you mean X?`, or all known words if none is near.

    Args:
      word, known: the unknown word, and the known ones.
      compared: the part of a word that tells it from the others.
    """
    names = {compared(str(name)): str(name) for name in known}
    near = difflib.get_close_matches(compared(word), names, n=1, cutoff=0.5)
    return f"did you mean {names[near[0]]!r}?" if near else f"known are {', '.join(sorted(names.values()))}."


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted keys and the values of all settings of a config or a section."""
    for key, value in config.items():
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check(config: Mapping[str, Any]) -> None:
    """Checks all values of a config that `SETTINGS` knows, and the conditions between them.

    Raises:
      UserError: a setting has a value that it may not have; the message names both, and the allowed values.
    """
    for key, value in leaves(config):
        if key in SETTINGS:
            _check_value(key, value, SETTINGS[key])
    for condition in (_one_length, _ordered_ranges, _canvas_holds_images, check_losses):
        condition(config)
    # What modules demand beyond this, they say when they are made.
    for model_condition in (_heads_divide_channels, _levels_fit, _no_denoising_of_positions, check_refiners):
        model_condition(config["model"])


def _check_value(key: str, value: Any, setting: Setting) -> None:
    items = list(value) if isinstance(value, tuple | list) else [value]
    if isinstance(value, tuple | list) != setting.many or not all(map(setting.is_of_type, items)):
        raise UserError(f"config.{key} is {_shown(value)}; it must be {setting.wanted()}.")
    if setting.length is not None and len(items) != setting.length:
        raise UserError(f"config.{key} is {value}; it must list {setting.length} values.")
    if setting.nonempty and not items:
        raise UserError(f"config.{key} is {value}; it must list one value at least.")
    for item in items:
        if isinstance(item, str):
            if setting.choices and item not in setting.choices:
                sentence = suggestion(item, setting.choices)
                if setting.unknown and not sentence.endswith("?"):
                    sentence = f"{sentence.removesuffix('.')}; if it is one of your own, {setting.unknown}."
                raise UserError(f"config.{key} names {item!r}; {sentence}")
        elif not isinstance(item, bool) and not setting.allows(item):
            what = "each" if isinstance(value, tuple | list) else "it"
            raise UserError(f"config.{key} is {_shown(value)}; {what} must be {setting.bounds() or 'a finite number'}.")


def _shown(value: Any) -> str:
    """A value as a text for messages; long ones are cut."""
    return textwrap.shorten(str(value), 60, placeholder=" ...") if len(str(value)) <= 200 else f"{str(value)[:40]}..."


def _one_length(config: Mapping[str, Any]) -> None:
    train = config["train"]
    if bool(train["steps"]) == bool(train["epochs"]):
        raise UserError(
            f"config.train.steps is {train['steps']} and config.train.epochs is {train['epochs']}; one of them must be at "
            "least 1, and the other 0."
        )


def _ordered_ranges(config: Mapping[str, Any]) -> None:
    limits = tuple(config["evaluate"]["max_detections"])
    if list(limits) != sorted(set(limits)):
        raise UserError(f"config.evaluate.max_detections is {limits}; each must be larger than the one before.")
    for key in ("crop_range", "lsj.scale_range"):
        low, high = dict(leaves(config["augmentation"]))[key]
        if low > high:
            raise UserError(f"config.augmentation.{key} is {(low, high)}; the smallest comes first.")


def _canvas_holds_images(config: Mapping[str, Any]) -> None:
    canvas, max_side = config["evaluate"]["canvas"], config["evaluate"]["max_side"]
    if canvas and canvas < max_side:
        raise UserError(f"config.evaluate.canvas is {canvas}; it must be 0, or at least evaluate.max_side, {max_side}.")


def _heads_divide_channels(model: Mapping[str, Any]) -> None:
    channels = model["channels"]
    if channels % 2:
        raise UserError(f"config.model.channels is {channels}; it must be even: half of them encode y, and half x.")
    used = (model["refiner"]["primary"], *model["refiner"]["auxiliaries"])
    attentions = [("heads", model["heads"])]
    attentions += [
        (f"refiner.{name}.heads", model["refiner"][name]["heads"])
        for name in ("regional_attention", "global_attention")
        if name in used
    ]
    for key, heads in attentions:
        if channels % heads:
            raise UserError(
                f"config.model.{key} is {heads}; config.model.channels, {channels}, do not divide into so many heads."
            )
    groups = model["neck"]["groups"]
    if channels % groups:
        raise UserError(
            f"config.model.neck.groups is {groups}; config.model.channels, {channels}, do not divide into so many groups."
        )


def _levels_fit(model: Mapping[str, Any]) -> None:
    backbone, levels, strides = model["backbone"], model["levels"], model["refiner"]["region"]["strides"]
    swin = backbone["kind"] == "swin"
    blocks = "depths" if swin else "blocks"
    if blocks not in backbone:
        raise UserError(
            f"config.model.backbone.kind is {backbone['kind']!r}, which needs config.model.backbone.{blocks}; choose a "
            "variant with that backbone, or set the whole section in a config file."
        )
    stages = len(backbone[blocks])
    first = backbone.get("first_map", 0 if swin else 1)
    maps = stages - first
    if maps < 1:
        raise UserError(f"config.model.backbone.first_map is {first}; there are {stages} stages, from 0 on.")
    if levels < maps or levels != len(strides):
        raise UserError(
            f"config.model.levels is {levels}; it must be at least {maps}, the maps of the backbone, and the number of "
            f"config.model.refiner.region.strides, {len(strides)}."
        )
    if backbone["frozen_stages"] > stages:
        raise UserError(f"config.model.backbone.frozen_stages is {backbone['frozen_stages']}; there are {stages} stages.")
    attention = model["refiner"].get("global_attention", {})
    if (
        "global_attention" in (model["refiner"]["primary"], *model["refiner"]["auxiliaries"])
        and attention["level"] >= levels
    ):
        raise UserError(
            f"config.model.refiner.global_attention.level is {attention['level']}; choose one of the pyramid's levels, 0 to "
            f"{levels - 1}."
        )


def _no_denoising_of_positions(model: Mapping[str, Any]) -> None:
    if model["queries"]["kind"] == "positions" and model["denoising"]["queries"]:
        raise UserError(
            "config.model.queries.kind 'positions' makes queries of boxes alone, and denoising queries have a label; set "
            "config.model.denoising.queries to 0."
        )


def require_refiners(model: Mapping[str, Any]) -> None:
    """Makes sure that the refiners of a stored detector's section `model` are known here.

    Raises:
      UserError: one of them is of another program, which has to register it.
    """
    for name in (model["refiner"]["primary"], *model["refiner"]["auxiliaries"]):
        if name not in REFINERS:
            raise UserError(f"The detector has the refiner {name!r}, which is none of this package's; {UNKNOWN_REFINER}.")


def check_refiners(model: Mapping[str, Any]) -> None:
    """Checks that the refiners of a section `model` fit one another; raises as `check` does."""
    refiner = model["refiner"]
    names = (refiner["primary"], *refiner["auxiliaries"])
    if len(set(names)) != len(names):
        raise UserError(f"config.model.refiner names a refiner twice: {', '.join(names)}.")
    initial = refiner["merge_initial"]
    if initial and len(initial) != len(names):
        raise UserError(
            f"config.model.refiner.merge_initial has {len(initial)} weights for {len(names)} refiners; give one for each, "
            "or none."
        )
    if refiner["merge_xavier"] and (initial or refiner["merge"] != "learned_vector"):
        raise UserError(
            "config.model.refiner.merge_xavier draws the weights of a learned_vector at random; for other merges and "
            "initial weights set --config.model.refiner.merge_xavier=False."
        )


def check_losses(config: Mapping[str, Any]) -> None:
    """Checks that the losses of a config suit its model; raises as `check` does."""
    model, loss = config["model"], config["loss"]
    if ("dense" in loss) != (model["queries"]["kind"] == "distinct"):
        raise UserError("config.loss.dense goes with config.model.queries.kind 'distinct', and only with it.")
    if "aligned" in loss and len(loss["aligned"]["repeats"]) != model["refiner"]["layers"]:
        raise UserError(
            f"config.loss.aligned.repeats lists {len(loss['aligned']['repeats'])} layers, and config.model.refiner.layers "
            f"is {model['refiner']['layers']}; give one number for each."
        )


def describe_settings(config: Mapping[str, Any]) -> str:
    """Lists every setting of a config with its value, its meaning and its bounds or choices, for `--help-config`."""
    lines, values = [], dict(leaves(config))
    for key in [*(key for key in SETTINGS if key in values), *(key for key in values if key not in SETTINGS)]:
        value = values[key]
        lines.append(f"--config.{key}={value!r}" if value in ("", ()) else f"--config.{key}={value}")
        if key in SETTINGS:
            setting, subject = SETTINGS[key], "Each is" if isinstance(value, tuple | list) else "It is"
            limits = f" {subject} {setting.bounds()}." if setting.bounds() else ""
            limits = f" {subject} one of {', '.join(setting.choices)}." if setting.choices else limits
            lines += textwrap.wrap(setting.meaning + limits, 96, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)
