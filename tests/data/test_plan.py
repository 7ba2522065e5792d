"""Which images an epoch takes, in which order, with which geometries and seeds: complete, and new in each epoch."""

from collections import Counter

import numpy as np
import pytest
import tiny
from pictures import dataset, plain

from hpr_jax.data.augmentation.crop_resize_flip import Geometry, draw_weak, evaluation_geometries
from hpr_jax.data.augmentation.views import ViewMaker
from hpr_jax.data.build import make_plan
from hpr_jax.data.loading.batch_plan import TrainPlan, choose_buckets, evaluation_plan, fits, smallest_bucket
from hpr_jax.data.loading.batches import EvaluationLoader, TrainLoader
from hpr_jax.data.loading.repeats import draw_repeats, repeat_factors

NESTED = [(32, 32), (64, 64), (96, 96)]


def square(*sides):
    """A plan's `draw` whose images are squares; the window tells which image a geometry was drawn for."""

    def draw(rng):
        return [Geometry((0, 0, index + 1, int(rng.integers(1, 10**6))), (side, side)) for index, side in enumerate(sides)]

    return draw


def make(*sides, batch_size=4, buckets=None, seed=0):
    return TrainPlan(
        square(*sides), len(sides), batch_size=batch_size, buckets=buckets or sorted({(s, s) for s in sides}), seed=seed
    )


def slots(plan, epoch):
    """All slots of an epoch."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [slot for step in steps for slot in plan[step].slots]


def indices(plan, epoch):
    return [slot.index for slot in slots(plan, epoch)]


def random_plan(count=23, batch_size=4, seed=0):
    sizes = np.tile([[100, 150], [90, 60], [64, 64]], (10, 1))[:count]
    trial = draw_weak(sizes, tiny.WEAK, np.random.default_rng(9))
    buckets = choose_buckets(np.array([g.size for g in trial]), 3, cover=[(64, 96), (96, 64)])
    return TrainPlan(lambda rng: draw_weak(sizes, tiny.WEAK, rng), count, batch_size=batch_size, buckets=buckets, seed=seed)


class TestImagesOfAnEpoch:
    def test_an_epoch_is_a_permutation(self):
        plan = make(*[64] * 20)
        for epoch in range(4):
            assert sorted(indices(plan, epoch)) == list(range(20))

    def test_leftovers_are_taken_once(self):
        """Three each of three sizes, in buckets that hold one another: two batches of four, of eight images."""
        for seed in range(5):
            plan = make(*[32] * 3, *[64] * 3, *[96] * 3, buckets=NESTED, seed=seed)
            assert plan.steps_per_epoch == 2
            for epoch in range(3):
                assert len(set(indices(plan, epoch))) == 8

    @pytest.mark.parametrize(("wide", "high"), [(3, 3), (7, 3), (3, 7), (4, 1)])
    def test_every_batch_is_full(self, wide, high):
        """Neither shape holds the other: a batch of what is left of one is filled with images that fit, its own at worst."""
        shapes = [(32, 64)] * wide + [(64, 32)] * high
        geometries = [Geometry((0, 0, w, h), (h, w)) for h, w in shapes]
        plan = TrainPlan(lambda rng: geometries, len(shapes), batch_size=4, buckets=[(32, 64), (64, 32)], seed=0)
        for step in range(3 * plan.steps_per_epoch):
            batch = plan[step]
            assert len(batch.slots) == 4
            assert {slot.geometry.size for slot in batch.slots} == {batch.shape}
            # An image comes again when all that fit have come.
            assert len({slot.index for slot in batch.slots}) >= 3

    def test_whole_batches_and_leftovers_share_no_image(self):
        """Six small, seven middle and nine large images: five batches of four, of twenty images."""
        plan = make(*[32] * 6, *[64] * 7, *[96] * 9, buckets=NESTED)
        for epoch in range(5):
            assert len(indices(plan, epoch)) == len(set(indices(plan, epoch))) == 20

    def test_images_that_find_no_place_are_others_in_each_epoch(self):
        plan = make(*[64] * 7, batch_size=4)
        left = [set(range(7)) - set(indices(plan, epoch)) for epoch in range(30)]
        assert all(len(some) == 3 for some in left)
        counts = Counter(index for some in left for index in some)
        # Thirteen times each, about.
        assert counts.keys() == set(range(7))
        assert max(counts.values()) <= 22

    def test_images_that_find_no_place_are_of_all_sizes(self):
        """Six each of three sizes, in buckets that hold one another: four of each become batches, and two of each are left
        over, of which two find no place."""
        plan = make(*[32] * 6, *[64] * 6, *[96] * 6, buckets=NESTED)
        left_out = Counter()
        for epoch in range(300):
            left_out.update({index // 6 for index in set(range(18)) - set(indices(plan, epoch))})
        assert min(left_out.values()) > 0.7 * max(left_out.values())
        assert len(left_out) == 3

    def test_geometries_are_those_of_their_images_and_fit(self):
        plan = make(*[32] * 5, *[64] * 5, *[96] * 7, buckets=NESTED)
        sides = [32] * 5 + [64] * 5 + [96] * 7
        for step in range(2 * plan.steps_per_epoch):
            for slot in plan[step].slots:
                assert slot.geometry.window[2] == slot.index + 1
                assert slot.geometry.size == (sides[slot.index],) * 2
                assert fits(slot.geometry.size, plan[step].shape)

    def test_a_batch_is_padded_no_more_than_its_bucket(self):
        plan = make(*[32] * 8, *[64] * 8, buckets=NESTED)
        for step in range(plan.steps_per_epoch):
            assert {slot.geometry.size for slot in plan[step].slots} == {plan[step].shape}


class TestBatches:
    def test_buckets(self):
        sizes = np.array([[60, 90]] * 10 + [[33, 33]] * 5 + [[64, 64]])
        assert choose_buckets(sizes, 3) == [(64, 64), (64, 96)]
        assert choose_buckets(sizes, 1) == [(64, 96)]
        assert (128, 64) in choose_buckets(sizes, 3, cover=[(100, 40)])
        assert choose_buckets(sizes, 1, cover=[(100, 40)]) == [(128, 96)]
        assert smallest_bucket([(64, 64), (64, 96)], (10, 70)) == (64, 96)
        with pytest.raises(ValueError, match="No bucket"):
            smallest_bucket([(64, 64)], (65, 10))

    def test_leftovers_stay_within_the_buckets(self):
        """No bucket holds both the portrait and the landscape images that are left over."""
        sizes = np.array([[60, 90]] * 9 + [[90, 60]] * 10)
        for seed in range(5):
            plan = TrainPlan(
                lambda rng: evaluation_geometries(sizes, 64, 96), 19, batch_size=4, buckets=[(64, 96), (96, 64)], seed=seed
            )
            batches = [plan[step] for step in range(plan.steps_per_epoch)]
            assert len(batches) == 4
            assert {batch.shape for batch in batches} == {(64, 96), (96, 64)}
            seen = [slot.index for batch in batches for slot in batch.slots]
            assert len(seen) == 16
            for step, batch in enumerate(batches):
                assert all(fits(slot.geometry.size, batch.shape) for slot in batch.slots)
                assert fits(next(plan.successors(step)).geometry.size, batch.shape)

    def test_epochs_take_the_images_in_turn(self):
        plan = random_plan()
        assert plan.steps_per_epoch == 5
        for epoch in range(3):
            batches = [plan[epoch * 5 + step] for step in range(5)]
            seen = [slot.index for batch in batches for slot in batch.slots]
            assert len(seen) == 20
            # A short last batch is filled with images that the epoch had already.
            assert len(set(seen)) >= 20 - plan.batch_size
            for batch in batches:
                assert all(
                    s.geometry.size[0] <= batch.shape[0] and s.geometry.size[1] <= batch.shape[1] for s in batch.slots
                )

    def test_follows_from_seed_and_step_alone(self):
        plan = random_plan()
        forward = [plan[step] for step in range(17)]
        other = random_plan()
        assert [other[step] for step in reversed(range(17))] == forward[::-1]
        assert [random_plan(seed=1)[step] for step in range(17)] != forward

    def test_successors_have_the_same_shape(self):
        plan = random_plan()
        successors = plan.successors(2)
        for _ in range(20):
            slot = next(successors)
            assert slot.geometry.size[0] <= plan[2].shape[0]
            assert slot.geometry.size[1] <= plan[2].shape[1]

    def test_evaluation_takes_each_image_once(self):
        geometries = evaluation_geometries(np.array([[48, 60], [60, 48], [50, 50]] * 5), 64, 96)
        plan = evaluation_plan(geometries, batch_size=4, buckets=choose_buckets(np.array([g.size for g in geometries]), 2))
        assert sorted(slot.index for batch in plan for slot in batch.slots) == list(range(15))
        assert all(len(batch.slots) <= 4 for batch in plan)


class TestEpochs:
    def test_orders_differ(self):
        plan = make(*[64] * 20)
        orders = [tuple(indices(plan, epoch)) for epoch in range(5)]
        assert len(set(orders)) == 5
        # Nor are they one another's rotations: the same neighbours in another place.
        follows = [set(zip(order, order[1:])) for order in orders]
        assert all(len(one & two) < 8 for one, two in zip(follows, follows[1:]))
        assert tuple(range(20)) not in orders

    def test_seeds_of_slots_are_never_the_same(self):
        plan = make(*[64] * 20)
        seeds = [slot.seed for epoch in range(4) for slot in slots(plan, epoch)]
        assert len(set(seeds)) == 80
        other = make(*[64] * 20, seed=1)
        assert set(seeds).isdisjoint(slot.seed for epoch in range(4) for slot in slots(other, epoch))

    def test_streams_of_slots_are_never_the_same(self):
        """Nor is one the epoch's own: NumPy takes (seed, epoch) and (seed, epoch, 0) for the same."""
        plan = make(*[64] * 20)
        seeds = [slot.seed for epoch in range(3) for slot in slots(plan, epoch)] + [(0, epoch) for epoch in range(3)]
        streams = {np.random.default_rng(seed).bytes(8) for seed in seeds}
        assert len(streams) == 63

    def test_an_image_keeps_its_seed_wherever_it_comes(self):
        """So that a view does not depend on the order: two plans of other batch sizes draw the same of an image."""
        few, many = make(*[64] * 20, batch_size=2), make(*[64] * 20, batch_size=10)
        for epoch in range(2):
            one, two = ({slot.index: slot.seed for slot in slots(plan, epoch)} for plan in (few, many))
            assert one == two

    def test_geometries_are_drawn_anew(self):
        plan = make(*[64] * 20)
        drawn = [{slot.index: slot.geometry for slot in slots(plan, epoch)} for epoch in range(3)]
        assert all(drawn[0][index] != drawn[1][index] != drawn[2][index] for index in range(20))

    def test_one_may_be_asked_for_again(self):
        """An epoch is the same again after others, although only the last few are held in memory."""
        plan = make(*[64] * 8)
        first = slots(plan, 0)
        for epoch in (5, 3, 9):
            assert slots(plan, epoch)
        assert slots(plan, 0) == first


class TestSuccessors:
    def test_the_next_images_of_the_same_shape_come_first(self):
        plan = make(*[32] * 8, *[96] * 8, batch_size=2, buckets=NESTED)
        for step in (0, 5, 11):
            shape = plan[step].shape
            expected = [
                slot for later in range(step + 1, step + 20) for slot in plan[later].slots if plan[later].shape == shape
            ]
            successors = plan.successors(step, limit=20)
            assert [next(successors) for _ in range(len(expected))] == expected

    def test_then_whatever_fits(self):
        plan = make(*[32] * 8, *[96] * 8, batch_size=2, buckets=NESTED)
        step = next(step for step in range(8) if plan[step].shape == (96, 96))
        assert {slot.geometry.size for slot in plan.successors(step, limit=20)} == {(32, 32), (96, 96)}


class TestShares:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_of_processes_are_disjoint_and_complete(self, count):
        side = tiny.SIDE
        pictures = dataset([plain(side, side, (number, 0, 0)) for number in range(8)], [[]] * 8)
        plan = make(*[side] * 8)
        plan.draw = lambda rng: [Geometry((0, 0, side, side), (side, side))] * 8
        loaders = [TrainLoader(plan, ViewMaker(pictures), 1, share=(index, count)) for index in range(count)]
        for epoch in range(2):
            steps = range(2 * epoch, 2 * epoch + 2)
            records = [record for step in steps for loader in loaders for record in loader[step].records]
            seen = [record.image_id for record in records if record is not None]
            assert sorted(seen) == list(range(10, 18))
            # In the plan's order, process by process.
            assert seen == [10 + slot.index for step in steps for slot in plan[step].slots]
            # The pixels are those of the records.
            pixels = [image[0, 0, 0] for step in steps for loader in loaders for image in loader[step].images]
            assert pixels == [image_id - 10 for image_id in seen]


class TestEvaluation:
    def test_every_image_once_with_its_own_geometry(self):
        geometries = [
            Geometry((0, 0, index + 1, 1), (side, side)) for index, side in enumerate([96, 32, 64, 32, 96, 32, 32])
        ]
        plan = evaluation_plan(geometries, batch_size=2, buckets=NESTED)
        assert [(batch.shape, [slot.index for slot in batch.slots]) for batch in plan] == [
            ((32, 32), [1, 3]),
            ((32, 32), [5, 6]),
            ((64, 64), [2]),
            ((96, 96), [0, 4]),
        ]
        assert all(slot.geometry == geometries[slot.index] for batch in plan for slot in batch.slots)

    @pytest.mark.parametrize("count", [1, 2, 3, 5])
    def test_shares_are_disjoint_and_complete(self, count):
        plan = evaluation_plan([Geometry((0, 0, 8, 8), (8, 8))] * 9, batch_size=2, buckets=[(32, 32)])
        pictures = dataset([plain(8, 8, (0, 0, 0))] * 9, [[]] * 9)
        shares = [EvaluationLoader(pictures, plan, 2, share=(index, count)).plan for index in range(count)]
        seen = [slot.index for share in shares for batch in share for slot in batch.slots]
        assert sorted(seen) == list(range(9))


class TestFromAConfig:
    def plan(self, seed=0, **augmentation):
        config = tiny.config()
        config.train.update(seed=seed, batch_size=3)
        config.augmentation.update(flip=0.5, crop=0.5, **augmentation)
        return make_plan(config, dataset([plain(48, 60, (0, 0, 0))] * 12, [[]] * 12))

    def test_seed_and_batch_size_are_those_of_the_config(self):
        one, again, other = self.plan(), self.plan(), self.plan(seed=7)
        assert (one.steps_per_epoch, len(one[0].slots)) == (4, 3)
        assert [one[step] for step in range(9)] == [again[step] for step in range(9)]
        assert indices(one, 0) != indices(other, 0)
        assert {slot.seed[0] for slot in slots(other, 0)} == {7}

    def test_the_kind_of_augmentation_is_that_of_the_config(self):
        assert all(slot.geometry.content is None for slot in slots(self.plan(), 0))
        large_scale = self.plan(kind="lsj", lsj={"side": 64})
        assert all(slot.geometry.size == (64, 64) and slot.geometry.content for slot in slots(large_scale, 0))

    @pytest.mark.parametrize(
        ("sizes", "crop", "largest"),
        [
            ([(40, 60)], 0.0, {(64, 96)}),
            ([(60, 40)], 0.0, {(96, 64)}),
            ([(60, 40), (40, 60)], 0.0, {(64, 96), (96, 64)}),
            ([(40, 60)], 0.5, {(64, 96), (96, 64)}),
            ([(60, 40)], 0.5, {(64, 96), (96, 64)}),
        ],
    )
    def test_a_bucket_holds_whatever_an_epoch_can_draw(self, sizes, crop, largest):
        """Images of a shape that no trial draws: the sides are 64 and 96 at most."""
        config = tiny.config()
        config.train.batch_size = 1
        config.data.buckets = 4
        config.augmentation.update(sides=(64,), max_side=96, crop=crop, crop_sides=(48,), crop_range=(32, 40))
        plan = make_plan(config, dataset([plain(*size, (0, 0, 0)) for size in sizes], [[]] * len(sizes)))
        assert all(any(fits(size, bucket) for bucket in plan.buckets) for size in largest)
        assert crop or all(any(fits(bucket, size) for size in largest) for bucket in plan.buckets)

    def test_flips_and_crops_are_others_in_each_epoch(self):
        plan = self.plan()
        drawn = [[slot.geometry for slot in sorted(slots(plan, epoch), key=lambda slot: slot.index)] for epoch in range(2)]
        assert [geometry.flip for geometry in drawn[0]] != [geometry.flip for geometry in drawn[1]]
        assert [geometry.window for geometry in drawn[0]] != [geometry.window for geometry in drawn[1]]


class TestRepeatedImages:
    """Of eight images, six show cups, one a pen beside a cup, and one nothing."""

    IMAGES = np.array([0, 0, 1, 2, 3, 4, 5, 5])
    LABELS = np.array([0, 0, 0, 0, 0, 0, 0, 1], np.int32)

    def factors(self, threshold=0.5):
        return repeat_factors(self.IMAGES, self.LABELS, 8, threshold)

    def test_an_image_has_the_factor_of_its_rarest_class(self):
        np.testing.assert_allclose(self.factors(), [1, 1, 1, 1, 1, 2, 1, 1])
        np.testing.assert_allclose(self.factors(1.0), [(8 / 6) ** 0.5] * 5 + [8**0.5] + [1, 1])

    def test_without_objects_all_are_taken_once(self):
        nothing = repeat_factors(np.zeros(0, int), np.zeros(0, int), 3, 0.5)
        assert nothing.tolist() == [1, 1, 1]

    def test_fractions_are_rounded_at_random_and_their_sum_stays(self):
        factors, rng = np.array([1.25, 1.0, 2.5, 1.25]), np.random.default_rng(0)
        drawn = np.array([draw_repeats(factors, rng) for _ in range(4000)])
        assert set(drawn.sum(axis=1)) == {6}
        assert np.all((drawn == np.floor(factors)) | (drawn == np.ceil(factors)))
        np.testing.assert_allclose(drawn.mean(axis=0), factors, atol=0.03)

    def test_a_sum_that_is_no_whole_number_is_rounded(self):
        factors, rng = np.array([1.4, 1.9, 1.0]), np.random.default_rng(0)
        drawn = np.array([draw_repeats(factors, rng) for _ in range(200)])
        assert set(drawn.sum(axis=1)) == {4}
        assert drawn.min() >= 1

    def test_an_epoch_takes_them_with_geometries_and_seeds_of_their_own(self):
        plan = TrainPlan(square(*[32] * 8), 8, batch_size=3, buckets=[(32, 32)], seed=1, repeats=self.factors())
        assert plan.steps_per_epoch == 3
        for epoch in range(5):
            taken = slots(plan, epoch)
            assert Counter(slot.index for slot in taken) == {index: 2 if index == 5 else 1 for index in range(8)}
            assert len({slot.seed for slot in taken}) == 9
            copies = [slot.geometry for slot in taken if slot.index == 5]
            assert copies[0] != copies[1]
        assert [slot.index for slot in slots(plan, 0)] != [slot.index for slot in slots(plan, 1)]
