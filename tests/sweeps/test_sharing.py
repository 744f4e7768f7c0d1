"""A data set that workers have in common."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig, RunConfig
from pipeline.data import Data, load
from sweeps import trial
from sweeps.executors import LocalExecutor
from sweeps.sharing import Shared, share
from tests.commands import call

Configure = Callable[..., RunConfig]

SOON = 60.0  # seconds


@pytest.fixture
def config(configure: Configure, tmp_path: Path) -> DataConfig:
    """Of a file that a test may take away."""
    draw = np.random.default_rng(0).integers
    np.savez(
        tmp_path / "own.npz",
        x_train=draw(0, 256, (200, 5, 4), np.uint8),
        y_train=np.arange(200) % 10,
        x_test=draw(0, 256, (50, 5, 4), np.uint8),
        y_test=np.arange(50) % 10,
    )
    return configure("data=npz", "data.name=own", f"data.path={tmp_path / 'own.npz'}").data


def seen(config: DataConfig) -> tuple[str, int, bool]:
    """By a worker: the training images it has, their sum, whether they are its own."""
    split = trial._load(config).train
    return split.digest, int(split.images.sum()), split.images.flags.writeable


def test_workers_have_what_is_shared_though_it_can_no_more_be_loaded(config: DataConfig) -> None:
    data = load(config)
    Path(config.path or "").unlink()

    with share(data, config) as shared, LocalExecutor(2, partial(trial.warm_up, shared)) as workers:
        found = {workers.submit(seen, config).result(timeout=SOON) for _ in range(4)}

    assert found == {(data.train.digest, int(data.train.images.sum()), False)}


def test_a_worker_that_dies_is_replaced_by_one_that_has_it_too(config: DataConfig) -> None:
    data = load(config)
    Path(config.path or "").unlink()

    with share(data, config) as shared, LocalExecutor(1, partial(trial.warm_up, shared)) as workers:
        died = workers.submit(os._exit, 1).exception(timeout=SOON)
        digest, *_ = workers.submit(seen, config).result(timeout=SOON)

    assert died is not None
    assert digest == data.train.digest


@pytest.mark.parametrize("another", ["file", "pipe", "nothing"])
def test_a_worker_that_finds_something_else_there_loads_it(
    another: str, config: DataConfig, tmp_path: Path
) -> None:
    data = load(config)
    (tmp_path / "file").write_text("not an array")
    os.mkfifo(tmp_path / "pipe")  # which nobody ever writes to

    with share(data, config) as shared:
        assert shared is not None
        files = {
            name: replace(file, path=tmp_path / another) for name, file in shared.files.items()
        }
        elsewhere = replace(shared, files=files)
        with LocalExecutor(1, partial(trial.warm_up, elsewhere)) as workers:
            digest, _, is_its_own = workers.submit(seen, config).result(timeout=SOON)

    assert (digest, is_its_own) == (data.train.digest, True)


def test_what_is_shared_no_more_is_not_there_and_what_was_mapped_stays(config: DataConfig) -> None:
    data = load(config)

    with share(data, config) as shared:
        assert shared is not None
        mapped = shared.open()

    for name, split in data.splits.items():
        assert np.array_equal(mapped.splits[name].images, split.images)
        assert np.array_equal(mapped.splits[name].labels, split.labels)
    with pytest.raises(OSError, match=r"No such file or directory|is not /memfd"):
        shared.open()


def test_nothing_is_shared_where_the_system_has_no_files_in_memory(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "memfd_create")

    with (
        share(load(config), config) as shared,
        LocalExecutor(1, partial(trial.warm_up, shared)) as workers,
    ):
        _, _, is_its_own = workers.submit(seen, config).result(timeout=SOON)

    assert (shared, is_its_own) == (None, True)


def test_a_sweep_needs_the_file_of_the_images_no_more_when_its_workers_start(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_away(data: Data, shared: DataConfig) -> AbstractContextManager[Shared | None]:
        Path(config.path or "").unlink()
        return share(data, shared)

    monkeypatch.setattr("sweeps.sweep.share", take_away)
    own = ["data=npz", "data.name=own", f"data.path={config.path}", "data.validation_size=0.2"]
    few = ["training.epochs=2", "pruner=none", "sweep.trials=3", "executor.workers=2"]

    swept = call(*own, *few, folder=tmp_path)

    assert swept.returncode == 0, swept.stderr
    assert "Best of 3 complete trials" in swept.stdout
