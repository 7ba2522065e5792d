"""Fine-tuning: the recipe for a detector, and parts that are not trained."""

import jax
import numpy as np
import pytest
import reference
import tiny
from flax import nnx

from hpr_jax.config import load_config
from hpr_jax.errors import UserError
from hpr_jax.models.build import abstract_detector
from hpr_jax.settings import PARTS, check
from hpr_jax.training.fine_tuning import fine_tuning_config
from hpr_jax.weights.official_names import dotted_path
from hpr_jax.weights.torch_file import write_checkpoint

RECIPE = f"{tiny.ROOT}/configs/finetune.py"


@pytest.fixture
def published(tmp_path):
    write_checkpoint(tmp_path / "dino.pth", reference.arrays("plain_dino_state_dict"), {})
    return tmp_path / "dino.pth"


def trained(detector):
    """Dotted paths of the variables that are trained."""
    return {dotted_path(path) for path, _ in nnx.to_flat_state(nnx.state(detector, nnx.Param))}


class TestRecipe:
    def test_model_and_losses_are_those_of_the_detector(self, published):
        config = fine_tuning_config(load_config(RECIPE), published)
        assert (config.model.channels, config.model.queries.count) == (32, 40)
        assert config.train.initial_weights == str(published)
        assert config.optimizer.learning_rate == load_config(RECIPE).optimizer.learning_rate
        check(config)

    def test_the_detector_of_ddq_brings_its_losses(self, tmp_path):
        tensors = reference.arrays("plain_ddq_5scale_state_dict")
        write_checkpoint(tmp_path / "ddq.pth", tensors, {"cfg": "model = dict(num_queries=40)\n"})
        config = fine_tuning_config(load_config(RECIPE), tmp_path / "ddq.pth")
        assert config.loss.dense.positives == 4
        check(config)

    def test_sizes_follow_the_detector_s(self, published, monkeypatch):
        config = fine_tuning_config(load_config(RECIPE), published, [("train.batch_size", "2")])
        assert (config.augmentation.sides[-1], config.augmentation.max_side) == (800, 1333)
        assert config.train.batch_size == 2
        recipe = load_config(RECIPE)
        detector = load_config(f"{tiny.ROOT}/configs/ddq.py:demo")
        monkeypatch.setattr("hpr_jax.training.fine_tuning.open_source", lambda place: tiny_source(detector))
        config = fine_tuning_config(recipe, "runs/demo")
        assert (config.augmentation.sides[0], config.augmentation.sides[-1], config.augmentation.max_side) == (77, 128, 128)
        assert config.augmentation.crop_range == (61, 96)

    def test_frozen_parts_are_the_recipe_s(self, published):
        config = fine_tuning_config(load_config(f"{RECIPE}:frozen"), published)
        assert config.model.frozen_parts == ("backbone", "neck", "encoder")

    def test_a_wrong_setting_is_told(self, published):
        with pytest.raises(UserError, match=r"There is no setting config\.train\.epoch"):
            fine_tuning_config(load_config(RECIPE), published, [("train.epoch", "2")])


def tiny_source(config):
    return type("Source", (), {"config": config})


class TestFrozenParts:
    # Beginnings of the variables' paths that belong to each part.
    PATHS = (
        ("backbone", ("backbone.",)),
        ("neck", ("neck.",)),
        ("encoder", ("encoder.",)),
        ("queries", ("query_init.",)),
        ("primary", ("refiner.layers.primary.", "refiner.position.", "refiner.norm.", "heads.")),
        ("merges", ("refiner.layers.merge_",)),
    )

    @staticmethod
    def detector(*parts):
        return abstract_detector({**reference.model_config("dino"), "frozen_parts": parts}, 3)

    def test_all_are_known(self):
        assert [part for part, _ in self.PATHS] == list(PARTS)

    @pytest.mark.parametrize(("part", "beginnings"), PATHS)
    def test_they_are_not_trained_and_others_are(self, part, beginnings):
        everything, rest = trained(self.detector()), trained(self.detector(part))
        left_out = {name for name in everything if name.startswith(beginnings)}
        assert left_out
        assert rest == everything - left_out

    def test_names_and_shapes_of_all_variables_stay(self):
        def shapes(detector):
            return {dotted_path(path): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(detector))}

        assert shapes(self.detector(*PARTS)) == shapes(self.detector())

    def test_gradients_are_those_of_the_others(self):
        config = {**reference.model_config("plain_dino"), "frozen_parts": ("backbone", "neck", "encoder")}
        detector = abstract_detector(config, reference.sizes()["num_classes"])
        detector = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype), detector)
        graph, params, rest = tiny.split_parameters(detector)
        images, image_sizes = reference.images()

        def loss(params):
            outputs = nnx.merge(graph, params, rest)(images, image_sizes)
            return outputs.primary.matching.boxes.sum() + outputs.primary.matching.logits.sum()

        gradients = jax.eval_shape(jax.grad(loss), params)
        names = {dotted_path(path) for path, _ in nnx.to_flat_state(gradients)}
        assert names == trained(detector)
        assert not any(name.startswith(("backbone.", "neck.", "encoder.")) for name in names)
