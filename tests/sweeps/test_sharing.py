"""A data set that workers have in common."""

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataConfig, RunConfig
from pipeline.data import load
from sweeps import trial
from sweeps.executors import LocalExecutor
from sweeps.sharing import share

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
    """By a worker: the training images it has, their sum, whether it can write to them."""
    split = trial._load(config).train
    return split.digest, int(split.images.sum()), split.images.flags.writeable


def test_workers_have_what_is_shared_whether_or_not_it_can_be_loaded(config: DataConfig) -> None:
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


def test_a_worker_of_another_machine_loads_it(config: DataConfig) -> None:
    data = load(config)

    with share(data, config) as shared:
        elsewhere = replace(shared, machine="another 0")
        with LocalExecutor(1, partial(trial.warm_up, elsewhere)) as workers:
            digest, _, writeable = workers.submit(seen, config).result(timeout=SOON)

    assert (digest, writeable) == (data.train.digest, True)


def test_what_is_no_longer_shared_is_not_there_and_what_was_mapped_stays(
    config: DataConfig,
) -> None:
    data = load(config)

    with share(data, config) as shared:
        mapped = shared.open()

    assert np.array_equal(mapped.train.images, data.train.images)
    assert mapped.splits.keys() == data.splits.keys()
    with pytest.raises(OSError, match="No such file or directory"):
        shared.open()
