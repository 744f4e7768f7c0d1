"""A training whose process was killed goes on, and ends as if it had not been."""

import functools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hydra
import keras
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra

from pipeline.checkpoint import (
    Array,
    Checkpoint,
    StoppingState,
    load_checkpoint,
    save_checkpoint,
)
from pipeline.compose import CONF, to_config
from pipeline.config import AugmentationConfig, RunConfig, TrainingConfig
from pipeline.data import Data, load
from pipeline.endings import DivergedError, StopRun
from pipeline.model import build_mlp, build_optimizer
from pipeline.train import EpochHook, History, Metrics, initialize, steps_per_epoch, train

pytestmark = pytest.mark.usefixtures("tensorflow")

SMALLEST: dict[str, Any] = {"hidden_units": 16, "hidden_layers": 1}
LONG = 60  # epochs, of 20 ms at least


# --- a training that is killed -----------------------------------------------------------


@functools.cache
def compose(*overrides: str) -> RunConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", ["data=digits", "training=quick", *overrides]))


@functools.cache
def digits() -> Data:
    return load(compose().data)


def misleading(*, validation: bool = True) -> Data:
    """Few digits, and to learn them makes the validation worse: its labels are the next class."""
    train, held_out = digits().train, digits().validation
    assert held_out is not None
    few = replace(train, images=train.images[:150], labels=train.labels[:150])
    other = replace(held_out, labels=(held_out.labels + 1) % 10)
    return replace(digits(), train=few, validation=other if validation else None)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model and its optimizer, not yet trained; `train` trains them."""

    model: keras.Model
    optimizer: keras.Optimizer
    data: Data
    config: TrainingConfig
    augmentation: AugmentationConfig

    def train(
        self, checkpoint: Path | None = None, hook: EpochHook = lambda epoch, metrics: None
    ) -> History:
        return train(
            self.model,
            self.optimizer,
            self.data,
            self.config,
            seed=7,
            augmentation=self.augmentation,
            on_epoch_end=hook,
            checkpoint=checkpoint,
        )

    @property
    def state(self) -> list[Array]:
        return [value.numpy() for value in (*self.model.variables, *self.optimizer.variables)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A configuration, and the epochs that its training takes."""

    option: str = "optimizer=rmsprop"
    model: dict[str, Any]
    optimizer: dict[str, Any]
    training: dict[str, Any]
    validation: bool = True
    trained: int = 5

    def network(self, *, seed: int = 0) -> Network:
        """With initial weights by the seed, which a training that goes on has no use for."""
        config, data = compose(self.option), misleading(validation=self.validation)
        length = {"epochs": 5, "batch_size": 32, "early_stopping_patience": None, **self.training}
        training = replace(config.training, **length)
        keras.utils.set_random_seed(seed)
        return Network(
            model=build_mlp(replace(config.model, **SMALLEST, **self.model), data),
            optimizer=build_optimizer(
                replace(config.optimizer, **self.optimizer),
                steps_per_epoch=steps_per_epoch(len(data.train), training),
                epochs=training.epochs,
                ema_momentum=training.ema_momentum,
            ),
            data=data,
            config=training,
            augmentation=config.augmentation,
        )


PLAIN = Case(
    model={"dropout_rate": 0.2},
    optimizer={"learning_rate": 0.01},
    training={"compile": "never", "restore_best_weights": True},
)
CASES = {
    "rmsprop": replace(
        PLAIN,
        model={"dropout_rate": 0.2, "batch_normalization": True, "l2": 1e-3, "max_norm": 1.0},
        optimizer={"learning_rate": 0.01, "momentum": 0.9},
    ),
    "rmsprop compiled": replace(
        PLAIN,
        model={"dropout_rate": 0.2, "batch_normalization": True},
        training={"compile": "always", "restore_best_weights": True, "epochs": 3},
        trained=3,
    ),
    "adam with a schedule": replace(
        PLAIN,
        option="optimizer=adam",
        optimizer={"schedule": "cosine", "warmup_epochs": 1.5, "weight_decay": 0.01},
        training={"compile": "never", "restore_best_weights": False},
    ),
    "sgd compiled with a schedule": replace(
        PLAIN,
        option="optimizer=sgd",
        optimizer={
            "learning_rate": 0.05,
            "schedule": "cosine",
            "warmup_epochs": 1.0,
            "momentum": 0.9,
            "nesterov": True,
        },
        training={"compile": "always", "restore_best_weights": False, "epochs": 3},
        trained=3,
    ),
    "distorted images, smooth labels, an average": replace(
        PLAIN,
        option="augmentation=elastic",
        model={"dropout_rate": 0.2, "input_dropout_rate": 0.1, "batch_normalization": True},
        training={
            "compile": "never",
            "restore_best_weights": True,
            "label_smoothing": 0.1,
            "ema_momentum": 0.8,
        },
    ),
    "an average of the last weights": replace(
        PLAIN,
        training={"compile": "always", "restore_best_weights": False, "ema_momentum": 0.8},
    ),
    "without validation": replace(PLAIN, validation=False),
    "without validation compiled": replace(
        PLAIN,
        validation=False,
        training={"compile": "always", "restore_best_weights": True, "epochs": 2},
        trained=2,
    ),
    **{
        f"stops early, best weights {restore}": replace(
            PLAIN,
            optimizer={"learning_rate": 1e-6},  # moves the weights, but no prediction
            training={
                "compile": "never",
                "restore_best_weights": restore,
                "early_stopping_patience": 3,
                "epochs": 9,
            },
            trained=4,
        )
        for restore in (True, False)
    },
}
ENDS = [(name, epoch) for name, case in CASES.items() for epoch in range(1, case.trained + 1)]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training came to, but for its times."""

    state: list[Array]
    epochs: list[Metrics]
    summary: Metrics


def outcome(net: Network, history: History) -> Outcome:
    summary = replace(history, fit_seconds=1.0).summary
    return Outcome(state=net.state, epochs=history.epochs, summary=summary)


def assert_identical(one: Outcome, other: Outcome) -> None:
    assert one.epochs == other.epochs
    assert one.summary == other.summary
    assert_identical_arrays(one.state, other.state)


def assert_identical_arrays(ours: list[Array], theirs: list[Array]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


@functools.cache
def uninterrupted(name: str) -> Outcome:
    net = CASES[name].network()
    return outcome(net, net.train())


@pytest.fixture(scope="module")
def left_by_a_kill() -> Iterator[Callable[[str, int], Path]]:
    """The checkpoint that a process leaves which is killed in the hook of an epoch."""
    with tempfile.TemporaryDirectory() as folder:

        @functools.cache
        def all_epochs(name: str) -> Path:
            kept = Path(folder) / name
            file = kept / "now.npz"

            def keep(epoch: int, metrics: Metrics) -> None:
                shutil.copy(file, kept / f"{epoch}.npz")

            CASES[name].network().train(file, keep)
            return kept

        yield lambda name, epoch: all_epochs(name) / f"{epoch}.npz"


@pytest.fixture
def left(left_by_a_kill: Callable[[str, int], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of that checkpoint, of the test's own."""

    def left(name: str = "rmsprop", epoch: int = 2) -> Path:
        return Path(shutil.copy(left_by_a_kill(name, epoch), tmp_path / "checkpoint.npz"))

    return left


# --- going on ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_writing_checkpoints_leaves_a_training_as_it_is(name: str, tmp_path: Path) -> None:
    net = CASES[name].network()

    history = net.train(tmp_path / "checkpoint.npz")

    assert_identical(outcome(net, history), uninterrupted(name))
    assert len(history.epochs) == CASES[name].trained


@pytest.mark.parametrize(("name", "epoch"), ENDS)
def test_a_training_that_goes_on_ends_as_one_that_was_not_interrupted(
    name: str, epoch: int, left: Callable[..., Path]
) -> None:
    net = CASES[name].network(seed=1)

    history = net.train(left(name, epoch))

    assert_identical(outcome(net, history), uninterrupted(name))


@pytest.mark.parametrize(("name", "epoch"), [("rmsprop", 1), ("rmsprop", 5), ("rmsprop", 3)])
def test_the_hook_is_called_again_with_the_last_epoch_and_then_with_those_that_follow(
    name: str, epoch: int, left: Callable[..., Path]
) -> None:
    seen: list[tuple[int, Metrics]] = []

    CASES[name].network(seed=1).train(left(name, epoch), lambda *call: seen.append(call))

    epochs = uninterrupted(name).epochs
    assert seen == list(enumerate(epochs, start=1))[epoch - 1 :]


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("stops early")])
def test_a_training_that_had_decided_to_stop_trains_no_more(
    name: str, left: Callable[..., Path]
) -> None:
    path = left(name, 4)
    seen: list[int] = []

    CASES[name].network(seed=1).train(path, lambda epoch, metrics: seen.append(epoch))

    assert seen == [4]
    assert len(load_checkpoint(path).epochs) == 4


class PowerCut(Exception):
    """Ends a hook before it is done."""


def test_an_epoch_of_which_the_hook_could_not_tell_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    calls: list[int] = []

    def hook(epoch: int, metrics: Metrics) -> None:
        calls.append(epoch)
        if calls == [1, 2]:
            raise PowerCut

    with pytest.raises(PowerCut):
        PLAIN.network().train(path, hook)
    PLAIN.network(seed=1).train(path, hook)

    assert calls == [1, 2, 2, 3, 4, 5]


def test_a_training_may_be_killed_again_and_again(tmp_path: Path) -> None:
    name, path = "rmsprop", tmp_path / "checkpoint.npz"

    def cut(epoch: int, metrics: Metrics) -> None:
        raise PowerCut

    def cut_from(first: int) -> EpochHook:
        return lambda epoch, metrics: cut(epoch, metrics) if epoch >= first else None

    for epoch in range(1, 6):
        with pytest.raises(PowerCut):
            CASES[name].network(seed=epoch - 1).train(path, cut_from(epoch))
    net = CASES[name].network(seed=9)
    history = net.train(path)

    assert_identical(outcome(net, history), uninterrupted(name))


def test_the_time_of_a_training_is_that_of_its_parts(left: Callable[..., Path]) -> None:
    path = left()
    save_checkpoint(replace(load_checkpoint(path), seconds=10_000.0), path)

    history = CASES["rmsprop"].network().train(path)

    assert 10_000.0 < history.fit_seconds < 10_600.0
    assert load_checkpoint(path).seconds == pytest.approx(history.fit_seconds, abs=60)


def test_stop_run_in_the_repeated_hook_ends_a_training_as_elsewhere(
    left: Callable[..., Path],
) -> None:
    path, net = left(), CASES["rmsprop"].network()

    def hook(epoch: int, metrics: Metrics) -> None:
        raise StopRun

    with pytest.raises(StopRun):
        net.train(path, hook)

    assert net.model.train_function is None
    assert len(load_checkpoint(path).epochs) == 2


def test_a_signal_in_the_repeated_hook_of_a_training_that_is_over_is_not_lost(
    left: Callable[..., Path],
) -> None:
    with pytest.raises(KeyboardInterrupt):
        CASES["rmsprop"].network().train(
            left(epoch=5), lambda epoch, metrics: signal.raise_signal(signal.SIGINT)
        )


@pytest.mark.parametrize("validation", [True, False])
def test_an_epoch_that_diverged_is_not_kept(validation: bool, tmp_path: Path) -> None:
    case = replace(
        PLAIN,
        option="optimizer=sgd",
        optimizer={"learning_rate": 1e30},
        validation=validation,
    )

    with pytest.raises(DivergedError):
        case.network().train(tmp_path / "checkpoint.npz")

    assert list(tmp_path.iterdir()) == []


# --- a process that is killed ------------------------------------------------------------

KILLED = replace(PLAIN, training={**PLAIN.training, "epochs": LONG, "batch_size": 2})


def train_in_a_process(checkpoint: str, *, kill_in: int) -> None:
    """What a process of its own runs, below; killed soon after the hook of an epoch."""
    initialize(threads=1, seed=0)

    def hook(epoch: int, metrics: Metrics) -> None:
        if epoch == kill_in:
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGKILL)).start()

    KILLED.network(seed=kill_in).train(Path(checkpoint), hook)


def python(call: str) -> subprocess.CompletedProcess[bytes]:
    here = Path(__file__)
    code = f"import {here.stem}; {here.stem}.{call}"
    path = os.pathsep.join([str(CONF.parent), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=120, check=False, capture_output=True
    )


def test_a_process_goes_on_bit_for_bit_where_another_was_killed(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.npz"

    killed = python(f"train_in_a_process({str(checkpoint)!r}, kill_in=3)")
    epochs = len(load_checkpoint(checkpoint).epochs)
    there, here = KILLED.network(seed=0), KILLED.network(seed=3)
    there.train(checkpoint)
    here.train()

    assert killed.returncode == -signal.SIGKILL
    assert 3 <= epochs < LONG
    assert_identical_arrays(there.state, here.state)


# --- a file of no use --------------------------------------------------------------------


def start_anew(path: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Trains with that checkpoint as if there were none; returns the warning."""
    net = CASES["rmsprop"].network()
    with caplog.at_level(logging.WARNING, "pipeline.train"):
        history = net.train(path)
    assert_identical(outcome(net, history), uninterrupted("rmsprop"))
    (warning,) = caplog.messages
    return warning


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_ignored_with_a_warning(
    share: float, left: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = left()
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    warning = start_anew(path, caplog)

    assert warning.startswith(f"training starts anew, without {path}: it is no whole checkpoint: ")
    assert len(load_checkpoint(path).epochs) == 5


@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, model={"dropout_rate": 0.2, "activation": "tanh"}),  # no moving averages
        replace(CASES["rmsprop"], option="optimizer=adam", optimizer={}),
        replace(CASES["rmsprop"], validation=False),
    ],
)
def test_a_checkpoint_of_another_training_is_ignored_with_a_warning(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "checkpoint.npz"
    case.network().train(path)

    warning = start_anew(path, caplog)

    assert "it is of another training" in warning


def test_a_checkpoint_of_wider_layers_leaves_no_trace(
    left: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = left()
    checkpoint = load_checkpoint(path)
    *others, last = checkpoint.model
    save_checkpoint(replace(checkpoint, model=[*others, last[..., None]]), path)

    warning = start_anew(path, caplog)

    assert "the shapes of the model differ" in warning


SMALL = Checkpoint(
    epochs=[{"loss": 0.1 + 0.2, "val_accuracy": 1 / 3}],
    seconds=1.5,
    model=[np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, 2**40])],
    optimizer=[np.array(3)],
    best_weights=[np.ones((2, 3), np.float32)],
    stopping=StoppingState(best=1 / 3, best_epoch=0, wait=0, stopped_epoch=0),
)


def assert_small(checkpoint: Checkpoint) -> None:
    assert_identical_arrays(checkpoint.model, SMALL.model)
    assert_identical_arrays(checkpoint.optimizer, SMALL.optimizer)
    assert_identical_arrays(checkpoint.best_weights, SMALL.best_weights)
    nothing: dict[str, Any] = {"model": [], "optimizer": [], "best_weights": []}
    assert replace(checkpoint, **nothing) == replace(SMALL, **nothing)


def read(path: Path) -> Checkpoint:
    """What the file holds; where it is refused, what it should."""
    try:
        return load_checkpoint(path)
    except ValueError:
        return SMALL


@pytest.mark.parametrize("stopping", [SMALL.stopping, None])
def test_a_checkpoint_is_read_as_it_was_written(
    stopping: StoppingState | None, tmp_path: Path
) -> None:
    path = tmp_path / "a" / "folder" / "checkpoint.npz"

    save_checkpoint(replace(SMALL, stopping=stopping), path)

    loaded = load_checkpoint(path)
    assert loaded.stopping == stopping
    assert_small(replace(loaded, stopping=SMALL.stopping))


@pytest.mark.parametrize("bits", [0x01, 0x10, 0xFF])
def test_a_flipped_byte_is_refused_or_changes_nothing(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(SMALL, path)
    content = path.read_bytes()

    for position in range(0, len(content), 5):
        changed = content[position] ^ bits
        path.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
        assert_small(read(path))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(SMALL, path)
    content = path.read_bytes()

    for length in range(0, len(content), 5):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="it is no whole checkpoint"):
            load_checkpoint(path)


def test_a_file_of_zeros_in_place_of_its_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(SMALL, path)
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half + bytes(path.stat().st_size - len(half)))

    with pytest.raises(ValueError, match="it is no whole checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "arrays", [{"other": np.zeros(1)}, {"record": np.array([{"epochs": []}], dtype=object)}]
)
def test_another_archive_is_refused_and_pickles_are_not_loaded(
    arrays: dict[str, Any], tmp_path: Path
) -> None:
    np.savez(tmp_path / "checkpoint.npz", **arrays)

    with pytest.raises(ValueError, match="it is no whole checkpoint"):
        load_checkpoint(tmp_path / "checkpoint.npz")


def test_no_file_is_no_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "checkpoint.npz")


# --- whole or not at all -----------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(SMALL, path)
    unwritable: Any = [{"loss": object()}]

    with pytest.raises(TypeError):
        save_checkpoint(replace(SMALL, epochs=unwritable), path)

    assert list(tmp_path.iterdir()) == [path]
    assert_small(load_checkpoint(path))


def test_a_reader_finds_a_whole_file_at_any_time(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.npz"
    ones = replace(SMALL, model=[np.ones(100_000)])
    zeros = replace(SMALL, model=[np.zeros(100_000)])
    save_checkpoint(ones, path)
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            save_checkpoint(ones, path)
            save_checkpoint(zeros, path)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    sums = {float(load_checkpoint(path).model[0].sum()) for _ in range(100)}
    over.set()
    for writer in writers:
        writer.join()

    assert sums <= {0.0, 100_000.0}
    assert list(tmp_path.iterdir()) == [path]
