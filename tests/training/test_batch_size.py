"""The batch size `auto`: which one is chosen, from how few plans, and that a run keeps it."""

import logging
import math
from types import SimpleNamespace

import pytest
import tiny

import hpr_jax
from hpr_jax.config import load_config, to_plain
from hpr_jax.data.build import load_training_data
from hpr_jax.data.dataset import Classes
from hpr_jax.errors import UserError
from hpr_jax.runtime import host_memory
from hpr_jax.runtime.devices import data_mesh
from hpr_jax.settings import check
from hpr_jax.training import batch_size
from hpr_jax.training.batch_size import ChosenBatch, choose_batch_size, largest_batch, log_choice, memory_limit, sizes
from hpr_jax.training.build import check_batch, with_batch_size, with_recipe_batch
from hpr_jax.training.memory_plan import StepMemory, StepPlanner
from hpr_jax.weights.checkpoint import Meta, checkpoint_config, read_meta


def automatic(directory=None):
    return with_batch_size(tiny.config(directory), "auto")


class Planner:
    """Stands in for the compiler: `fixed` bytes and `each` for an image; keeps what it was asked."""

    def __init__(self, fixed, each, largest=math.inf):
        self.fixed, self.each, self.largest, self.asked = fixed, each, largest, []

    def __call__(self, size):
        self.asked.append(size)
        return self.fixed + self.each * size if size <= self.largest else math.inf


class TestTheChoice:
    def test_sizes_are_multiples_that_make_sense(self):
        assert list(sizes(1, 20)) == [1, 2, 3, 4, 6, 8, 12, 16]
        assert list(sizes(4, 50)) == [4, 8, 12, 16, 24, 32, 48]
        assert list(sizes(8, 5)) == [8]

    def test_a_line_finds_it_in_four_plans(self):
        planner = Planner(1000, 100)
        assert largest_batch(planner, 10_000, 1, 10**6) == ChosenBatch(64, 7400, 10_000, None)
        assert planner.asked == [1, 2, 64]

    def test_what_fits_exactly_fits(self):
        assert largest_batch(Planner(1000, 100), 7400, 1, 10**6).size == 64
        assert largest_batch(Planner(1000, 100), 7399, 1, 10**6).size == 48

    def test_batches_are_multiples_of_devices_and_parts(self):
        assert largest_batch(Planner(0, 1), 100, 6, 10**6).size == 96

    def test_no_batch_is_larger_than_asked(self):
        planner = Planner(0, 1)
        assert largest_batch(planner, 10**9, 1, 40) == ChosenBatch(32, 32, 10**9, None)
        assert planner.asked == [1, 2, 32]

    @pytest.mark.parametrize("power", [0.8, 1.3])
    def test_memory_that_bends_is_followed(self, power):
        """Memory that rises more slowly or faster than a line: the choice is right all the same."""
        asked = []

        def memory(size):
            asked.append(size)
            return 1000 + 100 * size**power

        chosen = largest_batch(memory, 20_000, 1, 10**6)
        fitting = [size for size in sizes(1, 10**4) if 1000 + 100 * size**power <= 20_000]
        assert chosen.size == fitting[-1]
        assert len(asked) <= 6

    def test_what_cannot_be_compiled_does_not_fit(self):
        planner = Planner(0, 1, largest=20)
        chosen = largest_batch(planner, 1000, 1, 100)
        assert (chosen.size, chosen.larger) == (16, (24, math.inf))

    def test_one_that_is_too_large_tells_what_it_takes(self):
        planner = Planner(1000, 100)
        assert largest_batch(planner, 1099, 1, 100) == 1100
        assert planner.asked == [1]


class TestTheLimit:
    def test_gpus_have_nine_tenths_of_what_is_free(self):
        device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 100})
        mesh = SimpleNamespace(local_devices=[device, device])
        assert memory_limit(mesh, workers=8) == 810

    def test_devices_of_a_cpu_share_what_workers_leave(self, monkeypatch):
        monkeypatch.setattr(batch_size, "available_memory", lambda: 2 * batch_size.WORKER + 1000)
        device = SimpleNamespace(platform="cpu")
        assert memory_limit(SimpleNamespace(local_devices=[device] * 4), workers=2) == 225

    def test_a_device_that_does_not_tell_gets_a_sentence(self):
        device = SimpleNamespace(platform="tpu", memory_stats=lambda: None)
        mesh = SimpleNamespace(local_devices=[device], devices=SimpleNamespace(flat=[device]))
        with pytest.raises(UserError, match="the platform tpu does not tell its memory; give a number"):
            memory_limit(mesh, 0)

    def test_a_container_has_what_its_limit_leaves(self, monkeypatch, tmp_path):
        facts = tmp_path / "meminfo"
        facts.write_text("MemTotal: 8000 kB\nMemAvailable: 4000 kB\n")
        monkeypatch.setattr(host_memory, "MEMORY_FACTS", facts)
        monkeypatch.setattr(host_memory, "CONTROL_GROUPS", tmp_path)
        assert host_memory.available_memory() == 4_096_000
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("900000\n")
        (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 100000\n")
        assert host_memory.available_memory() == 4_096_000
        (tmp_path / "memory.max").write_text("1000000\n")
        assert host_memory.available_memory() == 200_000


def test_the_peak_is_that_of_the_program_with_most_alive():
    temporaries = {"forward": 50, "loss": 10, "backward": 30, "update": 5}
    memory = StepMemory(100, 200, 7, 1000, 20, 100, temporaries)
    # Parameters, moments, two batches; saved, cotangents and gradients; the temporaries of the backward pass.
    assert memory.peak == 100 + 200 + 14 + 1000 + 20 + 100 + 30
    assert memory.at_peak()["temporaries"] == 30
    temporaries["update"] = 5000
    assert memory.peak == 100 + 200 + 14 + 100 + 5000


class TestTheSetting:
    def test_the_command_line_takes_the_word_and_numbers(self):
        for text, value in (("auto", "auto"), ("12", 12)):
            config = load_config("ddq:demo", [("train.batch_size", text)])
            check(config)
            assert config.train.batch_size == value
        with pytest.raises(UserError, match="wants a whole number or auto, like 8, and got 'many'"):
            load_config("ddq:demo", [("train.batch_size", "many")])

    def test_it_can_be_split_over_any_devices(self):
        check_batch(automatic(), 8)
        with pytest.raises(UserError, match="must be a multiple of 8"):
            check_batch(with_batch_size(automatic(), 4), 8)

    def test_without_a_run_the_recipe_stands_in(self):
        assert with_recipe_batch(automatic()).train.batch_size == 8
        assert with_recipe_batch(tiny.config()).train.batch_size == 2

    def test_recipes_tell_what_they_are_made_for(self):
        for spec in ("ddq:r50_1x", "ddq:small", "ddq:demo", "finetune", "deformable_detr:plain_r50"):
            config = load_config(spec)
            assert config.optimizer.recipe_batch_size == config.train.batch_size, spec

    def test_the_rate_is_told_and_not_changed(self, caplog):
        caplog.set_level(logging.INFO, "hpr_jax")
        config = automatic()
        config.optimizer.learning_rate, config.train.steps = 1e-3, 700
        log_choice(ChosenBatch(32, 5_000_000_000, 6_000_000_000, (48, 7e9)), config)
        told, rate = (record.getMessage() for record in caplog.records)
        assert told == (
            "Batches have 32 images: a step is planned to take 5 GB of the 6 GB that each device has for it; 7 GB with 48."
        )
        assert rate.startswith(
            "config.optimizer.learning_rate stays 0.001, and config.train.steps 700: recipes are made for"
        )
        assert rate.endswith("this one for 8. Many multiply the rate by the square root of the ratio, which gives 0.002.")
        assert config.optimizer.learning_rate == 1e-3


def test_a_run_that_goes_on_keeps_the_number(coco, trained, monkeypatch, tmp_path):
    """It is read from the run's checkpoints, and nothing is chosen again."""
    monkeypatch.setattr(batch_size, "choose_batch_size", lambda *_: pytest.fail("chosen again"))
    workdir, _ = trained
    config, chosen = batch_size.resolve_batch_size(automatic(coco), workdir, None, None)
    assert (config.train.batch_size, chosen) == (2, None)
    assert to_plain(config) == to_plain(tiny.config(coco))
    assert batch_size.stored_batch_size(tmp_path) is None


def test_a_checkpoint_has_chosen():
    meta = Meta(to_plain(tiny.config()), Classes(("cup",), (2,)), 3, {})
    assert checkpoint_config(meta, [("train.batch_size", "auto")]).train.batch_size == 2


@pytest.mark.slow
def test_a_run_chooses_its_batch_and_keeps_it(tmp_path, monkeypatch, caplog, restored_log):
    caplog.set_level(logging.INFO, "hpr_jax")
    # An epoch of 39 images has ten batches of at most three.
    config = with_batch_size(tiny.small(tiny.write_coco(tmp_path / "data", train=40)), "auto")
    config.train.update(steps=1, checkpoint_every=1, evaluate_every=1)
    plans: dict[int, StepMemory | None] = {}
    plan = StepPlanner.__call__

    def remembered(planner, size):
        if size not in plans:
            plans[size] = plan(planner, size)
        return plans[size]

    monkeypatch.setattr(StepPlanner, "__call__", remembered)
    monkeypatch.setattr(batch_size, "memory_limit", lambda mesh, workers: 10**12)
    train, _ = load_training_data(config)
    train, mesh = train.subset(keep_empty=False, min_side=1), data_mesh()
    assert choose_batch_size(config, train, mesh).size == 3
    assert plans[1].peak < plans[2].peak < plans[3].peak
    most = choose_batch_size(config, train, mesh).planned
    monkeypatch.setattr(batch_size, "memory_limit", lambda mesh, workers: most - 1)
    workdir = tmp_path / "run"
    hpr_jax.train(config, workdir=workdir)
    assert read_meta(workdir).config["train"]["batch_size"] == 2
    assert "Batches have 2 images: a step is planned to take" in caplog.text

    # The second run takes what is stored, whatever there is room for now.
    monkeypatch.setattr(batch_size, "choose_batch_size", lambda *_: pytest.fail("chosen again"))
    caplog.clear()
    hpr_jax.train(config, workdir=workdir)
    assert "Step 1 of 1 is done already." in caplog.text
    assert "setting" not in caplog.text
