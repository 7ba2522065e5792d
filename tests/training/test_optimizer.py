"""Learning rates, AdamW, the moving average, and a step's update of small states, by hand-made values."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from hpr_jax.training.build import make_optimizer
from hpr_jax.training.optimizer import Optimizer, learning_rate, moving_average
from hpr_jax.training.state import TrainState
from hpr_jax.training.step import TrainStep

SCHEDULE = {
    "learning_rate": 1.0,
    "warmup_steps": 5,
    "warmup_factor": 0.5,
    "milestones": (6, 8, 10),
    "gamma": 0.1,
    "schedule": "milestones",
}


class TestLearningRate:
    def test_the_warm_up_ends_at_the_full_rate(self):
        rates = [learning_rate(SCHEDULE, step, 12) for step in range(6)]
        assert rates == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])

    def test_a_warm_up_of_one_or_two_steps(self):
        for steps in (1, 2):
            rates = [learning_rate({**SCHEDULE, "warmup_steps": steps}, step, 12) for step in range(3)]
            assert rates == pytest.approx([0.5, 1.0, 1.0])

    def test_each_milestone_multiplies_by_gamma(self):
        rates = [learning_rate(SCHEDULE, step, 12) for step in range(5, 12)]
        assert rates == pytest.approx([1.0, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3])

    def test_a_milestone_within_the_warm_up(self):
        rates = [learning_rate({**SCHEDULE, "milestones": (2,)}, step, 12) for step in (1, 2, 4)]
        assert rates == pytest.approx([0.625, 0.075, 0.1])

    def test_a_cosine_from_the_end_of_the_warm_up_to_the_end(self):
        """Half of the way lies between the full rate and gamma."""
        settings = {**SCHEDULE, "schedule": "cosine"}
        rates = [learning_rate(settings, step, 16) for step in range(16)]
        assert rates[:6] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0, 1.0])
        assert rates[10] == pytest.approx(0.55)
        assert rates[15] == pytest.approx(0.1)
        assert rates[5:] == sorted(rates[5:], reverse=True)
        assert learning_rate(settings, 99, 16) == pytest.approx(0.1)

    def test_without_warm_up_and_milestones(self):
        assert [learning_rate({**SCHEDULE, "warmup_steps": 0, "milestones": ()}, step, 12) for step in (0, 99)] == [1.0, 1.0]


class TestMovingAverage:
    def test_early_steps_forget_faster(self):
        """The decay is (1 + step) / (10 + step) until that reaches the given one."""
        averages = [
            float(moving_average(jnp.zeros(()), jnp.ones(()), 0.9, jnp.int32(step))) for step in (0, 8, 79, 80, 1000)
        ]
        assert averages == pytest.approx([0.9, 0.5, 1 - 80 / 89, 0.1, 0.1], abs=1e-6)

    def test_every_leaf_moves_towards_its_own_parameter(self):
        average = moving_average(
            {"a": jnp.array([0.0, 2.0]), "b": jnp.array(4.0)}, {"a": jnp.ones(2), "b": jnp.array(8.0)}, 0.5, 80
        )
        assert average["a"].tolist() == [0.5, 1.5]
        assert float(average["b"]) == 6.0


class TestAdamW:
    def test_settings_reach_the_optimizer(self):
        config = tiny.config()
        config.optimizer.update(clip_norm=0.25, weight_decay=0.5, backbone_multiplier=0.125)
        assert make_optimizer(config) == Optimizer(clip_norm=0.25, weight_decay=0.5, backbone_multiplier=0.125)

    def test_gradients_are_clipped_before_adam(self):
        """Moments of a gradient of norm 5, clipped to 1: (0.6, 0.8) times 1 - 0.9, and its squares times 1 - 0.999."""
        optimizer = Optimizer(clip_norm=1.0, weight_decay=0.0, backbone_multiplier=1.0)
        params = {"heads": jnp.array([1.0, 2.0])}
        _, state = optimizer.update({"heads": jnp.array([3.0, 4.0])}, optimizer.init(params), params, 0.1)
        first, second = (leaf for leaf in jax.tree.leaves(state) if leaf.size == 2)
        np.testing.assert_allclose(first, [0.06, 0.08], rtol=1e-5)
        np.testing.assert_allclose(second, [0.36e-3, 0.64e-3], rtol=1e-5)

    def test_smaller_gradients_are_not_clipped_and_0_clips_none(self):
        for clip_norm in (10.0, 0.0):
            optimizer = Optimizer(clip_norm=clip_norm, weight_decay=0.0, backbone_multiplier=1.0)
            params = {"heads": jnp.array([1.0, 2.0])}
            _, state = optimizer.update({"heads": jnp.array([3.0, 4.0])}, optimizer.init(params), params, 0.1)
            np.testing.assert_allclose(
                next(leaf for leaf in jax.tree.leaves(state) if leaf.size == 2), [0.3, 0.4], rtol=1e-5
            )

    def test_second_steps_know_the_first(self):
        """Gradients 1, then 3: m = (0.9 * 0.1 + 0.3) / 0.19, v = (0.999 * 0.001 + 0.009) / 0.001999."""
        optimizer = Optimizer(clip_norm=0.0, weight_decay=0.0, backbone_multiplier=1.0)
        params = {"heads": jnp.array([0.0])}
        state = optimizer.init(params)
        for gradient in (1.0, 3.0):
            before = params["heads"]
            params, state = optimizer.update({"heads": jnp.array([gradient])}, state, params, 0.1)
        expected = -0.1 * (0.39 / 0.19) / (0.009999 / 0.001999) ** 0.5
        assert float((params["heads"] - before)[0]) == pytest.approx(expected, rel=1e-4)

    def test_the_backbone_alone_is_slower_and_everything_decays(self):
        optimizer = Optimizer(clip_norm=0.0, weight_decay=0.5, backbone_multiplier=0.1)
        names = ("backbone", "neck", "encoder", "query_init", "refiner", "heads", "branch_heads")
        params = {name: {"backbone": jnp.array([2.0])} for name in names}
        still = jax.tree.map(jnp.zeros_like, params)
        moved, _ = optimizer.update(still, optimizer.init(params), params, 0.1)
        # Without a gradient there is the decay alone: 2 - rate x 0.5 x 2.
        for name in names:
            assert float(moved[name]["backbone"][0]) == pytest.approx(1.99 if name == "backbone" else 1.9), name


class TestUpdateOfAStep:
    """Gradients 1 and 2 of two devices for one parameter, 5 and 7 for another: their sums have norm 12.37."""

    def update(self, average=None, decay=0.0, step=0, optimizer=None):
        optimizer = optimizer or Optimizer(clip_norm=0.1, weight_decay=0.0, backbone_multiplier=1.0)
        # Plain dicts in place of states, and neither a detector nor a loss: an update needs none.
        params: Any = {"heads": jnp.array([1.0]), "neck": jnp.array([1.0])}
        gradients: Any = {"heads": jnp.array([[1.0], [2.0]]), "neck": jnp.array([[5.0], [7.0]])}
        frozen: Any = {"frozen": jnp.array(3.0)}
        nothing: Any = None
        state = TrainState(jnp.int32(step), params, frozen, optimizer.init(params), average)
        train_step = TrainStep(nothing, nothing, optimizer, seed=0, average_decay=decay)
        return train_step._update(state, gradients, jnp.float32(0.25))

    def test_gradients_of_devices_are_summed_and_their_norm_is_not_clipped(self):
        state, norm = self.update()
        assert float(norm) == pytest.approx((3**2 + 12**2) ** 0.5)
        first = next(leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.size == 2)
        np.testing.assert_allclose(first, 0.1 * 0.1 * np.array([3, 12]) / 153**0.5, rtol=1e-5)

    def test_the_rate_reaches_the_parameters(self):
        state, _ = self.update(step=4)
        assert [float(state.params[name][0]) for name in ("heads", "neck")] == pytest.approx([0.75, 0.75], rel=1e-5)
        assert int(state.step) == 5
        assert float(state.frozen["frozen"]) == 3.0
        assert state.average is None

    def test_the_average_moves_towards_the_new_parameters(self):
        """In the first step it moves by 0.9: from 2 to 0.1 x 2 + 0.9 x 0.75. Later it moves by 1 minus the decay."""
        before = {"heads": jnp.array([2.0]), "neck": jnp.array([4.0])}
        state, _ = self.update(before, decay=0.8)
        found = [float(state.average[name][0]) for name in ("heads", "neck")]
        assert found == pytest.approx([0.1 * 2 + 0.9 * 0.75, 0.1 * 4 + 0.9 * 0.75], rel=1e-5)
        state, _ = self.update(before, decay=0.8, step=1000)
        assert float(state.average["heads"][0]) == pytest.approx(0.8 * 2 + 0.2 * 0.75, rel=1e-5)
