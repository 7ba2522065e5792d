"""The precision of products: heads are exact, the rest as the config says, gradients as what they are gradients of."""

import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
import tf32
import tiny
from flax import nnx

from hpr_jax.models.build import abstract_detector
from hpr_jax.models.heads import PredictionHead
from hpr_jax.ops.attention import attention
from hpr_jax.ops.linear import affine
from hpr_jax.ops.platform import programs_for
from hpr_jax.ops.precision import exact, products

FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def precisions(jaxpr):
    """Of all products of a program: the precision, and the shape of the right factor."""
    return [(product.params["precision"], product.invars[1].aval.shape) for product in jaxprs.products(jaxpr)]


def of_gradient(function, *arguments):
    return [precision for precision, _ in precisions(jax.make_jaxpr(jax.grad(function))(*arguments).jaxpr)]


class TestGradients:
    """They are traced outside of the context in which the product was."""

    def test_of_a_linear_layer(self):
        x, kernel = jnp.ones((3, 4)), jnp.ones((4, 5))

        def apply(x):
            with exact():
                y = affine(x, kernel, None)
            return jnp.sum(affine(y, kernel.T, None))

        assert sorted(map(str, of_gradient(apply, x))) == sorted(map(str, [FULL] * 3 + [None] * 3))

    def test_of_attention(self):
        x = jnp.ones((1, 128, 2, 8))

        def attend(x, precision):
            with products(precision):
                return jnp.sum(attention(x, x, x, implementation="xla"))

        assert set(of_gradient(lambda x: attend(x, "highest"), x)) == {FULL}
        assert set(of_gradient(lambda x: attend(x, "default"), x)) == {None}

    def test_what_jax_is_told_holds_where_the_config_says_nothing(self):
        with jax.default_matmul_precision("highest"):
            found = of_gradient(lambda x: jnp.sum(affine(x, x, None)), jnp.ones((3, 3)))
        assert set(found) == {FULL}


class TestDetector:
    def of_detector(self, **compute):
        config = tiny.config()
        detector = abstract_detector(config.model, tiny.CLASSES, {**config.compute, **compute})
        images, sizes = jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3)), jnp.array([[tiny.SIDE, tiny.SIDE]])
        graph, state = nnx.split(detector)
        with programs_for("cuda"):
            return precisions(jax.make_jaxpr(lambda state: nnx.merge(graph, state)(images, sizes, train=True))(state).jaxpr)

    def test_heads_alone_are_exact(self):
        found = self.of_detector()
        # Class layers end in three classes, and box layers in four numbers; nothing else does.
        last = [precision for precision, shape in found if shape[-1] in (tiny.CLASSES, 4) and len(shape) == 2]
        assert last
        assert set(last) == {FULL}
        assert {precision for precision, shape in found if len(shape) == 4 and shape[0] == shape[1] == 3} == {None}

    def test_all_is_exact_if_the_config_says_so(self):
        assert {precision for precision, _ in self.of_detector(precision="highest")} == {FULL}


class TestRounding:
    """What TF32 would do, emulated."""

    def test_numbers_are_rounded_to_eleven_bits(self):
        x = jnp.array([1.0, 1 + 2**-10, 1 + 2**-12, 1 + 3 * 2**-12, -3.0e-5], jnp.float32)
        np.testing.assert_array_equal(tf32.rounded(x)[:4], [1.0, 1 + 2**-10, 1.0, 1 + 2**-10])
        assert tf32.rounded(x)[4] == pytest.approx(-3.0e-5, rel=5e-4)

    def test_scores_are_those_of_float32(self, monkeypatch):
        head = PredictionHead(16, 3, rngs=nnx.Rngs(0))
        features = jax.random.normal(jax.random.key(0), (50, 16))
        before = head.logits(features)
        tf32.emulate(monkeypatch)
        np.testing.assert_array_equal(head.logits(features), before)
        tf32.emulate(monkeypatch, also_exact=True)
        assert 1e-5 < np.abs(head.logits(features) - before).max() < 1e-2

    def test_the_rest_is_as_the_config_says(self, monkeypatch):
        x, kernel = jax.random.normal(jax.random.key(0), (2, 20, 20))
        before = affine(x, kernel, None)
        tf32.emulate(monkeypatch)
        with products("highest"):
            np.testing.assert_array_equal(affine(x, kernel, None), before)
        assert np.abs(affine(x, kernel, None) - before).max() > 1e-5
