"""Worker processes: they load the same batches as threads do, and nothing is left of them whatever happens."""

import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import loaders
import numpy as np
import pytest
import tiny

from hpr_jax.data.augmentation.crop_resize_flip import evaluation_geometries
from hpr_jax.data.build import load_dataset, make_plan, make_views, room_for_boxes, wants_masks
from hpr_jax.data.loading.batch_plan import choose_buckets, evaluation_plan
from hpr_jax.data.loading.batches import EvaluationLoader, TrainLoader, train_batches
from hpr_jax.data.loading.workers import LoadedByWorkers
from hpr_jax.data.sources.coco import load_coco
from hpr_jax.errors import DataLostError, RunError, UserError
from hpr_jax.settings import check

ARRAYS = ("images", "sizes", "boxes", "labels", "valid")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads about processes in /proc, which only Linux has")


@pytest.fixture
def coco(tmp_path):
    return tiny.write_coco(tmp_path / "data", train=8)


def make_loader(coco, kind="lsj", batch_size=2, share=(0, 1)):
    """Loads weak and strong views, with masks and pasted objects if the kind is lsj."""
    config = tiny.config(coco)
    config.augmentation.update(kind=kind, strong_views=True)
    config.augmentation.lsj.side = tiny.SIDE
    config.train.batch_size = batch_size
    dataset = load_dataset(config.data, "train", masks=wants_masks(config))
    views = make_views(config, dataset)
    return TrainLoader(make_plan(config, dataset), views, room_for_boxes(config, dataset, views), share)


def assert_same(batch, expected):
    for name in ARRAYS:
        one, other = getattr(batch, name), getattr(expected, name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert_same_records(batch, expected)
    assert (batch.reports, batch.views) == (expected.reports, expected.views)


def assert_same_records(batch, expected):
    """The same images are in the same places, and the same places are empty."""
    one, other = ([record and record.image_id for record in some.records] for some in (batch, expected))
    assert one == other


def processes(batches):
    return [worker.process.pid for worker in batches._workers]


def runs(pid):
    """Whether a process runs. One that has ended may still be listed, as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def open_memory():
    """Shared memory that this process has open or mapped."""
    files = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return [name for name in (*files, *Path("/proc/self/maps").read_text().splitlines()) if "memfd:hpr_jax" in name]


class TestBatches:
    @pytest.mark.parametrize("kind", ["detr", "lsj"])
    @pytest.mark.parametrize("workers", [1, 2, 3])
    def test_are_those_of_the_loader(self, coco, kind, workers):
        """The steps start in the middle of an epoch and go on in the next, and an image cannot be read."""
        loader = make_loader(coco, kind)
        loader.make_views.dataset.records[4].image.path.write_bytes(b"broken")
        expected = [loader[step] for step in range(3, 11)]
        assert any(batch.reports for batch in expected)
        batches = list(train_batches(loader, 3, 11, threads=1, workers=workers))
        assert len(batches) == 8
        # All batches are held at once: none may lie in memory that a later one was written to.
        for batch, other in zip(batches, expected):
            assert_same(batch, other)
            assert batch.images.flags.writeable

    def test_of_no_steps(self, coco):
        assert list(train_batches(make_loader(coco), 5, 5, threads=1, workers=2)) == []

    def test_grow_and_shrink(self):
        """Whatever can be pickled can be a batch, and shared memory grows with it."""
        loader = [np.arange(size, dtype=np.int16) for size in (5, 0, 100_000, 3, 300_000, 7)]
        for batch, expected in zip(LoadedByWorkers(loader, range(6), 1), loader, strict=True):
            np.testing.assert_array_equal(batch, expected)


class TestWorkers:
    def test_are_light_and_leave_the_device_alone(self):
        batches = LoadedByWorkers(loaders.Describing(), range(4), 2)
        described = list(batches)
        assert len({description.pop("pid") for description in described} - {os.getpid()}) == 2
        assert described == 4 * [
            {
                "imports JAX": False,
                "platform": "cpu",
                "OpenCV's threads": 1,
                # One thread loads, one waits for the end of the parent.
                "threads": 2,
                "threads of the system": 2,
                "ignores": True,
            }
        ]

    @pytest.mark.parametrize("source", ["coco", "tfds_directory"])
    def test_loading_imports_no_jax(self, source, request):
        loader = make_loader(request.getfixturevalue(source))
        ((batch, imported),) = LoadedByWorkers(loaders.Watching(loader), range(1), 1)
        assert_same(batch, loader[0])
        assert not imported

    def test_ignore_signals_that_end_a_run(self):
        batches = LoadedByWorkers(range(100), range(100), 1)
        (worker,) = processes(batches)
        assert next(batches) == 0
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker, number)
        assert list(batches) == list(range(1, 100))


class TestFailures:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_for_the_user_is_the_same(self, coco, workers, capfd):
        loader = make_loader(coco)
        for record in loader.make_views.dataset.records:
            record.image.path.unlink()
        with pytest.raises(DataLostError) as expected:
            loader[0]
        with pytest.raises(DataLostError) as found:
            next(train_batches(loader, 0, 9, threads=1, workers=workers))
        assert str(found.value) == str(expected.value)
        assert capfd.readouterr().err == ""

    def test_an_error_comes_in_the_place_of_its_batch(self):
        batches = LoadedByWorkers({0: "a", 1: "b", 2: "c", 4: "e"}, range(5), 2)
        assert [next(batches) for _ in range(3)] == ["a", "b", "c"]
        with pytest.raises(KeyError) as caught:
            next(batches)
        assert caught.value.args == (3,)
        # The worker's traceback is there for those who print this one.
        assert "batch = loader[step]" in caught.value.__notes__[0]
        assert list(batches) == []

    def test_an_error_that_cannot_cross_is_described(self):
        with pytest.raises(RuntimeError, match="Odd: this 0"):
            next(LoadedByWorkers(loaders.Failing(), range(1), 1))

    def test_an_end_is_told_from_an_error(self):
        with pytest.raises(RunError, match="ended with exit code 3"):
            next(LoadedByWorkers(loaders.Failing(), [1], 1))
        with pytest.raises(ConnectionResetError, match="of a file server"):
            next(LoadedByWorkers(loaders.Failing(), [2], 1))

    def test_a_killed_worker_ends_the_run(self):
        batches = LoadedByWorkers(loaders.Slow(quick=4), range(9), 2)
        assert [next(batches), next(batches)] == [0, 1]
        began, pids = time.monotonic(), processes(batches)
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(RunError, match=r"was ended by SIGKILL.*lower config.data.workers"):
            list(batches)
        assert time.monotonic() - began < 60
        assert not any(map(runs, pids))


@linux
class TestEnds:
    @pytest.mark.parametrize("how", ["close", "forget", "while loading"])
    def test_nothing_is_left(self, how):
        batches = LoadedByWorkers(loaders.Slow(quick=0 if how == "while loading" else 1), range(5), 2)
        if how != "while loading":
            assert next(batches) == 0
        pids = processes(batches)
        assert all(map(runs, pids))
        assert open_memory()
        began = time.monotonic()
        if how == "forget":
            del batches
            gc.collect()
        else:
            batches.close()
            assert list(batches) == []
        assert not any(map(runs, pids))
        assert time.monotonic() - began < 60
        assert not open_memory()

    def test_they_end_with_a_killed_parent(self, tmp_path):
        """The parent is a script that does not ask whether it runs as the main program."""
        script = tmp_path / "script.py"
        script.write_text(
            textwrap.dedent(
                """
                import time
                import loaders
                from hpr_jax.data.loading.workers import LoadedByWorkers

                batches = LoadedByWorkers(loaders.Slow(quick=2), range(6), 2)
                assert [next(batches), next(batches)] == [0, 1]
                print(*(worker.process.pid for worker in batches._workers), flush=True)
                time.sleep(600)
                """
            )
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [tiny.ROOT, tiny.ROOT / "tests/helpers"]))}
        with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
            assert parent.stdout is not None
            pids = list(map(int, parent.stdout.readline().split()))
            assert len(pids) == 2
            assert all(map(runs, pids))
            parent.kill()
        began = time.monotonic()
        while any(map(runs, pids)):
            assert time.monotonic() - began < 60
            time.sleep(0.01)

    def test_threads_end_too(self):
        def threads():
            return len(list(Path("/proc/self/task").iterdir()))

        before = threads()
        batches = train_batches(loaders.Empty(), 0, 1000, threads=3)
        assert len(next(batches).images) == 0
        assert threads() > before
        batches.close()
        began = time.monotonic()
        while threads() > before:
            assert time.monotonic() - began < 60
            time.sleep(0.01)


class TestShares:
    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_put_together_are_the_batch(self, coco, count):
        full = make_loader(coco, batch_size=4)
        # The image that takes its place must be the same in every share.
        broken = full.make_views.dataset.records[full.plan[1].slots[2].index]
        broken.image.path.write_bytes(b"broken")
        shares = [make_loader(coco, batch_size=4, share=(index, count)) for index in range(count)]
        for step in range(3):
            batch, parts = full[step], [loader[step] for loader in shares]
            for name in ARRAYS:
                by_view = [np.split(getattr(part, name), 2) for part in parts]
                joined = np.concatenate([share[view] for view in (0, 1) for share in by_view])
                np.testing.assert_array_equal(joined, getattr(batch, name))
            assert sorted(report for part in parts for report in part.reports) == sorted(batch.reports)
            assert all(len(part.images) == len(batch.images) // count for part in parts)
        assert full[1].reports

    def test_must_be_equal(self, coco):
        with pytest.raises(ValueError, match="4 images cannot be shared equally by 3"):
            make_loader(coco, batch_size=4, share=(0, 3))

    @pytest.mark.parametrize("count", [2, 3, 7])
    def test_of_evaluation_have_every_image_once(self, coco, count):
        dataset = load_coco(coco, "train2017", "annotations/instances_train2017.json")
        geometries = evaluation_geometries(dataset.sizes, 64, 96)
        plan = evaluation_plan(geometries, batch_size=3, buckets=choose_buckets(np.array([g.size for g in geometries]), 1))
        full = EvaluationLoader(dataset, plan, 3)
        shares = [EvaluationLoader(dataset, plan, 3, share=(index, count)) for index in range(count)]
        assert sum(map(len, shares)) == len(full) == 3
        for number in range(len(full)):
            batch = shares[number % count][number // count]
            np.testing.assert_array_equal(batch.images, full[number].images)
            assert_same_records(batch, full[number])


def test_fewer_than_no_workers_are_refused(coco):
    config = tiny.config(coco)
    config.data.workers = -1
    with pytest.raises(UserError, match=r"config.data.workers is -1; it must be at least 0"):
        check(config)
