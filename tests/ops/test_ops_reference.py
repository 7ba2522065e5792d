"""The operations against the op files of `HPR_REFERENCE_DIR`, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import arrays, assert_close, sizes

from hpr_jax.models.position import box_encoding, map_encoding
from hpr_jax.ops.deformable_sampling import deformable_sampling
from hpr_jax.ops.nms import nms_first, nms_mask
from hpr_jax.ops.roi_align import roi_align


def test_deformable_sampling():
    a = arrays("op_deformable_sampling")
    shapes = tuple(map(tuple, a["spatial_shapes"].tolist()))
    arguments = tuple(map(jnp.asarray, (a["value"], a["sampling_locations"], a["attention_weights"])))
    out, pullback = jax.vjp(lambda v, x, w: deformable_sampling(v, shapes, x, w), *arguments)
    assert_close(out, a["output"], 1e-5)
    for name, gradient in zip(("value", "sampling_locations", "attention_weights"), pullback(jnp.asarray(a["grad_output"]))):
        assert_close(gradient, a[f"grad_{name}"], 1e-4, name)


def test_roi_align():
    a = arrays("op_roi_align")
    levels = [a[f"level.{i}"] for i in range(sum(name.startswith("level.") for name in a))]
    shapes = tuple(level.shape[2:] for level in levels)
    channels = levels[0].shape[1]
    rois, output_size = a["rois"], a["output"].shape[-1]
    # One image per region: the reference's list of (image, box) becomes a batch of single queries.
    image = rois[:, 0].astype(int)
    flat = np.concatenate([level.reshape(*level.shape[:2], -1).transpose(0, 2, 1) for level in levels], axis=1)
    valid = jnp.broadcast_to(jnp.array(shapes, jnp.int32), (len(rois), len(shapes), 2))

    def regions(features):
        return roi_align(
            features[image],
            shapes,
            valid,
            jnp.asarray(rois[:, None, 1:]),
            strides=tuple(8 * 2**i for i in range(len(shapes))),
            output_size=output_size,
            sampling_ratio=sizes()["roi_sampling_ratio"],
            finest_scale=sizes()["roi_finest_scale"],
        )[:, 0]

    def official(regions):
        return regions.reshape(-1, output_size, output_size, channels).transpose(0, 3, 1, 2)

    out, pullback = jax.vjp(lambda f: official(regions(f)), jnp.asarray(flat))
    assert_close(out, a["output"], 1e-5)
    (gradient,) = pullback(jnp.asarray(a["grad_output"]))
    start = 0
    for level, (height, width) in enumerate(shapes):
        part = gradient[:, start : start + height * width].reshape(-1, height, width, channels)
        assert_close(part.transpose(0, 3, 1, 2), a[f"grad_level.{level}"], 1e-4, f"level {level}")
        start += height * width


def test_map_encoding_inside_the_valid_area():
    a = arrays("op_encodings")
    valid = ~a["padding_mask"]
    batch, height, width = valid.shape
    image_sizes = jnp.asarray(np.stack([valid[:, :, 0].sum(1), valid[:, 0, :].sum(1)], axis=1))
    for name, settings in (
        ("sine_t20", {"temperature": 20.0, "offset": 0.0}),
        ("sine_t10000_offset", {"temperature": 10000.0, "offset": -0.5}),
    ):
        expected = a[name].transpose(0, 2, 3, 1)
        encoding = np.asarray(map_encoding(image_sizes, height, width, expected.shape[-1], **settings))
        assert_close(encoding[valid], expected[valid], 1e-5, name)


def test_box_encoding():
    a = arrays("op_encodings")
    assert_close(box_encoding(jnp.asarray(a["boxes_cxcywh"]), a["box_sine"].shape[-1] // 4), a["box_sine"], 1e-5)


def test_nms():
    a = arrays("op_nms")
    boxes, scores = jnp.asarray(a["boxes"]), jnp.asarray(a["scores"])
    everything = jnp.ones(len(scores), bool)
    for name, keep in a.items():
        if not name.startswith("keep_"):
            continue
        threshold = float(name.removeprefix("keep_"))
        index, found = nms_first(boxes, scores, everything, len(scores), threshold)
        np.testing.assert_array_equal(np.asarray(index)[np.asarray(found)], keep)
        np.testing.assert_array_equal(np.flatnonzero(nms_mask(boxes, scores, everything, threshold)), np.sort(keep))
