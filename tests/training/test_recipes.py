"""Every official recipe is a variant, and has the official values that `tests/reference_values/recipes.txt` lists."""

from pathlib import Path

import pytest
import tiny

from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.losses.aligned import AlignedMatchedLoss
from hpr_jax.losses.build import make_criterion
from hpr_jax.losses.matched import FocalMatchedLoss
from hpr_jax.settings import check
from hpr_jax.training.build import advice_on_dtype, check_matching, in_steps, warn_of_recipe

MODELS = ("deformable_detr", "dino", "align_detr", "ddq")
ROWS = [
    [cell.strip() for cell in line.split("|")]
    for line in (Path(__file__).parent.parent / "reference_values" / "recipes.txt").read_text().splitlines()
    if line and not line.startswith("#")
]


def variant(official):
    """Config file and variant of a recipe: `align_detr-lsj_900q_4scale_2x_swinL` -> (`align_detr`, `swin_l_2x_lsj`)."""
    model = next(name for name in MODELS if official.startswith(name))
    *_, length, backbone = official.split("_")
    return model, f"{'swin_l' if backbone == 'swinL' else 'r50'}_{length}{'_lsj' if '-lsj_' in official else ''}"


def load(model, name):
    return load_config(f"{tiny.ROOT}/configs/{model}.py:{name}")


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_recipes_hold_the_official_values(row):
    official, queries, length, milestones, warmup, rate, decay, images_per_gpu, use_lsj = row
    model, name = variant(official)
    config = load(model, name)
    check(config)
    count, unit = length.split()
    assert (config.train.steps, config.train.epochs) == ((int(count), 0) if unit == "steps" else (0, int(count)))
    assert config.optimizer.milestones == tuple(map(int, milestones.split()))
    warmup_steps, factor = warmup.split() if warmup != "-" else (0, 1e-4)
    assert (config.optimizer.warmup_steps, config.optimizer.warmup_factor) == (int(warmup_steps), float(factor))
    assert config.optimizer.learning_rate == float(rate)
    assert config.optimizer.weight_decay == float(decay)
    assert config.model.queries.count == int(queries)
    # `use_lsj` sets the valid size of an image to its padded size. That changes nothing on canvases, which count as image,
    # nor for an image that is alone on its GPU, which has no padding.
    lsj = name.endswith("_lsj")
    assert use_lsj == "no" or lsj or images_per_gpu == "1"
    assert config.evaluate.canvas == (1024 if lsj else 0)
    assert config.data.keep_empty == lsj
    assert config.data.min_side == 32
    assert config.train.evaluate_every == (1 if unit == "epochs" else 8000)
    denoises = model != "deformable_detr"
    assert config.model.denoising.queries == (100 if denoises else 0)
    if denoises:
        assert config.model.denoising.views_per_chunk == 2 * int(images_per_gpu)
    assert config.augmentation.kind == ("lsj" if lsj else "detr")
    assert config.augmentation.strong_views


# mmdetection's config of each plain detector, by file and variant of ours: levels, strides of the maps, backbone, epochs,
# milestones, learning rate, factor of the backbone's, weight decay, steps of warm-up.
PLAIN = {
    "dino:plain_r50": ("dino", 4, "resnet", 12, (11,), 1e-4, 0.1, 1e-4, 0),
    "dino:plain_swin_l_5scale": ("dino", 5, "swin", 12, (11,), 1e-4, 0.1, 1e-4, 0),
    "ddq:plain_r50": ("ddq", 4, "resnet", 12, (11,), 2e-4, 0.1, 0.05, 2000),
    "ddq:plain_r50_5scale": ("ddq", 5, "resnet", 12, (11,), 2e-4, 0.1, 0.05, 2000),
    "ddq:plain_swin_l": ("ddq", 4, "swin", 30, (20, 26), 2e-4, 0.05, 0.05, 2000),
    "deformable_detr:plain_r50": ("deformable_detr", 4, "resnet", 50, (40,), 2e-4, 0.1, 1e-4, 0),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_detectors_hold_mmdetection_s_values(name):
    file, levels, backbone, epochs, milestones, rate, multiplier, decay, warmup = PLAIN[name]
    config = load(file, name.partition(":")[2])
    check(config)
    model, optimizer = config.model, config.optimizer
    two_stage = file == "deformable_detr"
    queries, denoising, batch_size = (300, 0, 32) if two_stage else (900, 100, 16)
    assert (model.refiner.auxiliaries, model.queries.count, model.denoising.queries) == ((), queries, denoising)
    assert (config.loss.class_weight, optimizer.offsets_multiplier) == ((2.0, 0.1) if two_stage else (1.0, 1.0))
    assert (model.levels, model.backbone.kind, model.backbone.first_map) == (levels, backbone, 5 - levels)
    assert model.refiner.region.strides == (4, 8, 16, 32, 64)[5 - levels :]
    assert (model.neck.bias, model.pixel_std, model.denoising.views_per_chunk) == (False, (58.395, 57.12, 57.375), 2)
    assert (config.train.epochs, optimizer.milestones, config.train.batch_size) == (epochs, milestones, batch_size)
    assert (optimizer.learning_rate, optimizer.backbone_multiplier) == (rate, multiplier)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (decay, warmup)
    assert (config.augmentation.strong_views, config.data.keep_empty, config.data.min_side) == (False, True, 32)


@pytest.mark.parametrize("name", PLAIN)
def test_hpr_from_plain_is_the_plain_detector_with_more_refiners(name):
    file, *_ = PLAIN[name]
    plain, grown = load(file, name.partition(":")[2]), load(file, f"from_{name.partition(':')[2]}")
    check(grown)
    of_plain, of_grown = plain.model.to_dict(), grown.model.to_dict()
    changed = {key for key in of_plain["refiner"] if of_plain["refiner"][key] != of_grown["refiner"][key]}
    assert changed <= {"auxiliaries", "merge_initial", "merge_xavier"}
    refiner = grown.model.refiner
    assert (refiner.auxiliaries, refiner.merge_initial) == (("regional_attention", "dynamic_conv"), (1.0, 0.0, 0.0))
    for key in of_plain:
        assert of_plain[key] == of_grown[key] or key in ("refiner", "denoising")
    assert grown.augmentation.strong_views
    assert (grown.optimizer.merge_multiplier, grown.optimizer.merge_decay) == (10.0, False)


def test_every_variant_is_official_and_every_recipe_a_variant():
    expected: dict[str, set[str]] = {model: set() for model in MODELS}
    for row in ROWS:
        model, name = variant(row[0])
        expected[model].add(name)
    for model in MODELS:
        listed = set()
        plain = {name for name, (of, *_) in PLAIN.items() if of == model}
        plain = {name.partition(":")[2] for name in plain}
        for name in expected[model] | {"small", "demo"} | plain | {f"from_{name}" for name in plain}:
            load(model, name)
            listed.add(name)
        with pytest.raises(UserError, match="no variant") as error:
            load(model, "zzz")
        known = str(error.value).partition("known are ")[2].rstrip(".").split(", ")
        assert set(known) == listed
    assert len(ROWS) == 30


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_what_all_recipes_have_in_common(row):
    model, name = variant(row[0])
    config = load(model, name)
    m, o = config.model, config.optimizer
    assert (m.channels, m.levels, m.hidden, m.encoder.layers, m.refiner.layers) == (256, 4, 2048, 6, 6)
    assert (o.backbone_multiplier, o.clip_norm, o.gamma, config.train.batch_size) == (0.1, 0.1, 0.1, 16)
    assert (m.denoising.label_noise, m.denoising.box_noise) == (0.5, 1.0)
    sides = (1024, 1024) if name.endswith("_lsj") else (800, 1333)
    assert (config.evaluate.detections, config.evaluate.side, config.evaluate.max_side) == (300, *sides)
    assert config.loss.branch_weight == 0.5
    assert m.refiner.auxiliaries == ("regional_attention", "dynamic_conv")
    assert (m.refiner.merge, m.refiner.merge_points, m.refiner.merge_initial) == ("learned_vector", ("attention", "ffn"), ())
    assert m.refiner.region.to_dict() == {
        "strides": (8, 16, 32, 64),
        "output_size": 7,
        "sampling_ratio": 2,
        "finest_scale": 56.0,
    }
    assert m.refiner.dynamic_conv.hidden == 64
    assert m.refiner.regional_attention.to_dict() == {"heads": 8, "samples": 5, "temperature": 20.0}

    align, swin = model == "align_detr", name.startswith("swin_l")
    assert (m.encoder.position_offset, m.encoder.position_temperature) == ((-0.5, 10000.0) if align else (0.0, 20.0))
    assert m.pixel_std[0] == (58.335 if model in ("deformable_detr", "dino") else 58.395)
    assert m.neck.bias == (align or swin)
    assert m.refiner.merge_xavier == (model == "ddq")
    if swin:
        assert m.backbone.to_dict() == {
            "kind": "swin",
            "first_map": 0,
            "embed_channels": 192,
            "depths": (2, 2, 18, 2),
            "heads": (6, 12, 24, 48),
            "window": 12,
            "drop_path": 0.2,
            "frozen_stages": -1,
        }
    else:
        assert (m.backbone.kind, m.backbone.norm, m.backbone.blocks) == ("resnet", "frozen_batch", (3, 4, 6, 3))
        assert m.backbone.frozen_stages == (0 if align else 1)

    criterion = make_criterion(config)
    assert (criterion.costs.classes, criterion.costs.l1, criterion.costs.giou) == (2.0, 5.0, 2.0)
    matched = criterion.matched
    assert isinstance(matched, AlignedMatchedLoss if align else FocalMatchedLoss)
    assert (matched.class_weight, matched.boxes.l1_weight, matched.boxes.giou_weight) == (1.0, 5.0, 2.0)
    assert criterion.branch_weights == (("regional_attention", 0.5), ("dynamic_conv", 0.5))
    if align:
        assert (criterion.repeats, criterion.proposal_repeats) == ((2, 2, 2, 2, 2, 1), 2)
        assert isinstance(matched, AlignedMatchedLoss)
        assert (matched.alpha, matched.gamma, matched.tau) == (0.25, 2.0, 1.5)
    else:
        assert criterion.repeats == ()
    if model == "ddq":
        assert (m.queries.dense_ratio, m.queries.nms_threshold) == (1.5, 0.8)
        dense = criterion.dense
        assert (dense.alpha, dense.beta, dense.positives, dense.giou_weight) == (1.0, 6.0, 4, 2.0)


def test_settings_of_losses_reach_them():
    config = load("align_detr", "r50_1x")
    config.loss.branch_weight = 0.25
    config.loss.aligned.update(alpha=0.5, gamma=3.0, tau=4.0, repeats=(3, 3, 3, 3, 3, 2), proposal_repeats=5)
    criterion = make_criterion(config)
    matched = criterion.matched
    assert isinstance(matched, AlignedMatchedLoss)
    assert (matched.alpha, matched.gamma, matched.tau) == (0.5, 3.0, 4.0)
    assert (criterion.repeats, criterion.proposal_repeats) == ((3, 3, 3, 3, 3, 2), 5)
    assert dict(criterion.branch_weights) == {"regional_attention": 0.25, "dynamic_conv": 0.25}
    config = load("ddq", "r50_1x")
    config.loss.dense.update(alpha=2.0, beta=3.0, giou_weight=4.0, positives=5)
    dense = make_criterion(config).dense
    assert dense is not None
    assert (dense.alpha, dense.beta, dense.giou_weight, dense.positives) == (2.0, 3.0, 4.0, 5)


def test_lengths_in_epochs_become_steps():
    config = in_steps(load("dino", "r50_2x"), 100)
    assert (config.train.steps, config.train.evaluate_every) == (2400, 100)
    assert config.optimizer.milestones == (1600, 2200)
    check(config)
    steps = load("ddq", "r50_1x")
    assert in_steps(steps, 100) == steps


def test_a_kernel_that_cannot_run_is_refused():
    with pytest.raises(UserError, match=r"config\.train\.matching 'pallas' needs an NVIDIA GPU.* only the platform cpu"):
        check_matching("pallas", "cpu")
    for matching, platform in (("pallas", "gpu"), ("auto", "cpu"), ("scipy", "gpu")):
        check_matching(matching, platform)


def test_settings_that_are_probably_mistakes_are_warned_about(caplog):
    quick = load("ddq", "demo")
    for config in (load("ddq", "r50_1x_lsj"), load("ddq", "r50_1x"), quick):
        warn_of_recipe(config)
    assert not caplog.text
    quick.augmentation.kind = "lsj"
    warn_of_recipe(quick)
    assert "canvases of side 1024, and config.evaluate.canvas is 0" in caplog.text
    caplog.clear()
    quick.augmentation.kind = "detr"
    quick.train.update(steps=0, epochs=12)
    warn_of_recipe(quick)
    assert "must count epochs" in caplog.text


@pytest.mark.parametrize(
    ("model", "change", "sentence"),
    [
        ("align_detr", lambda c: c.model.refiner.update(layers=3), r"loss.aligned.repeats lists 6 layers"),
        ("ddq", lambda c: c.model.queries.update(kind="top"), r"loss.dense goes with"),
        ("dino", lambda c: c.train.update(steps=5), r"one of them must be"),
    ],
)
def test_settings_that_contradict_each_other(model, change, sentence):
    config = load(model, "r50_1x")
    change(config)

    def start():
        check(config)
        make_criterion(config)

    with pytest.raises(UserError, match=sentence):
        start()


def test_types_that_do_not_suit_the_platform_are_told():
    assert "bfloat16 is faster" in (advice_on_dtype("float32", "gpu") or "")
    assert "float32 is faster" in (advice_on_dtype("bfloat16", "cpu") or "")
    assert advice_on_dtype("float32", "cpu") is advice_on_dtype("bfloat16", "gpu") is None
