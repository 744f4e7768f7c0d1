"""A training is that of Keras' `fit`, repeats itself, and ends as it is told to."""

import functools
import hashlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hydra.core.global_hydra import GlobalHydra

from pipeline import program
from pipeline.augmentation import Distortion
from pipeline.compose import CONF, to_config
from pipeline.config import AugmentationConfig, RunConfig, TrainingConfig
from pipeline.data import Data, Split, load
from pipeline.endings import DivergedError, StopRun
from pipeline.evaluate import evaluate
from pipeline.fused import FUSED
from pipeline.model import build_mlp, build_optimizer
from pipeline.program import averages_of
from pipeline.train import (
    EpochHook,
    History,
    Metrics,
    _pays_to_compile,
    initialize,
    order_of,
    steps_per_epoch,
    train,
)

pytestmark = pytest.mark.usefixtures("tensorflow")

NUM_IMAGES = 1_197  # of the digits: 1,437 less 240 for validation
LONG = 2_000  # epochs that no test waits for
WAYS = ("always", "never")
METRICS = {"loss", "accuracy", "val_loss", "val_accuracy"}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Puts back what a test installed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def handlers_now() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# --- a training --------------------------------------------------------------------------


@functools.cache
def compose(*overrides: str) -> RunConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return to_config(hydra.compose("run", ["data=digits", "training=quick", *overrides]))


@functools.cache
def digits() -> Data:
    return load(compose().data)


def first(num_images: int, *, validation: bool = True) -> Data:
    """The digits, with the first images alone to train on."""
    train = digits().train
    few = replace(train, images=train.images[:num_images], labels=train.labels[:num_images])
    return replace(digits(), train=few, validation=digits().validation if validation else None)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model and its optimizer, not yet trained; `train` trains them."""

    model: keras.Model
    optimizer: keras.Optimizer
    data: Data
    config: TrainingConfig
    augmentation: AugmentationConfig

    def train(self, hook: EpochHook = lambda epoch, metrics: None, *, seed: int = 0) -> History:
        return train(
            self.model,
            self.optimizer,
            self.data,
            self.config,
            seed=seed,
            augmentation=self.augmentation,
            on_epoch_end=hook,
        )


def network(
    *options: str,
    data: Data | None = None,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    **training: Any,
) -> Network:
    """A small network on the digits; fields given replace those of its configuration."""
    config, data = compose(*options), data or digits()
    length = replace(config.training, **{"epochs": 2, "compile": "never", **training})
    shape = replace(config.model, **{"hidden_units": 16, "hidden_layers": 1, **(model or {})})
    random.seed(0)  # as `initialize` does
    return Network(
        model=build_mlp(shape, data),
        optimizer=build_optimizer(
            replace(config.optimizer, **(optimizer or {})),
            steps_per_epoch=steps_per_epoch(len(data.train), length),
            epochs=length.epochs,
            ema_momentum=length.ema_momentum,
        ),
        data=data,
        config=length,
        augmentation=config.augmentation,
    )


def assert_equal_weights(model: keras.Model, other: keras.Model, *, atol: float = 0) -> None:
    for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


EVERYTHING = {"dropout_rate": 0.2, "batch_normalization": True, "l2": 1e-3, "max_norm": 1.0}


@pytest.mark.parametrize(
    ("compile_", "model"),
    [
        ("always", {"batch_normalization": True}),
        ("always", {"hidden_layers": 0}),
        ("always", EVERYTHING),
        ("never", EVERYTHING),
    ],
)
def test_a_training_improves_whatever_the_network(compile_: str, model: dict[str, Any]) -> None:
    net = network(
        data=first(300),
        model={"hidden_units": 32, **model},
        optimizer={"learning_rate": 0.005},
        epochs=6,
        batch_size=32,
        compile=compile_,
    )

    history = net.train()

    losses = [metrics["loss"] for metrics in history.epochs]
    assert losses == sorted(losses, reverse=True)
    assert history.epochs[-1]["val_accuracy"] > 0.7


@pytest.mark.parametrize("ema_momentum", [0.0, 0.5])
def test_the_bound_on_the_weights_holds_after_a_training(ema_momentum: float) -> None:
    net = network(
        "optimizer=adam",
        data=first(32),
        model={"max_norm": 0.5},
        optimizer={"learning_rate": 0.005},
        batch_size=32,
        ema_momentum=ema_momentum,
        compile="always",
    )

    net.train()

    kernels = [weight for weight in net.model.get_weights() if weight.ndim == 2]
    assert max(np.linalg.norm(kernel, axis=0).max() for kernel in kernels) < 0.5 + 1e-5


def batches_in_order(net: Network, seed: int) -> Iterator[tuple[Any, Any]]:
    """The order that `train` promises, apart from it."""
    split, size = net.data.train, net.config.batch_size
    for epoch in range(net.config.epochs):
        key = tf.constant([seed, epoch], tf.int64)
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split)), key).numpy()
        for start in range(0, len(split), size):
            rows = order[start : start + size]
            yield split.images[rows], split.labels[rows]


PARTS = {"batch_normalization": True, "l2": 1e-3, "max_norm": 1.0, "hidden_layers": 2}
COSINE = {"schedule": "cosine", "momentum": 0.5}
WARM = {"schedule": "cosine", "warmup_epochs": 0.5, "weight_decay": 0.01}


def train_twice(
    option: str, *, batch_size: int, **settings: Any
) -> tuple[Network, History, Network, Any]:
    """A network as `train` does, and as plain `fit` does with the same batches."""
    settings["model"] = {"dropout_rate": 0.0, **settings["model"]}
    ours, plain = (network(option, batch_size=batch_size, **settings) for _ in range(2))
    plain.model.compile(
        plain.optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    history = ours.train(seed=3)
    of_fit = plain.model.fit(
        batches_in_order(plain, seed=3),
        epochs=2,
        steps_per_epoch=math.ceil(NUM_IMAGES / batch_size),
        shuffle=False,
        verbose=0,
    )
    return ours, history, plain, of_fit


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has programs update as Keras does, so that all else can be compared to the last bit."""
    program._program.cache_clear()
    for optimizer in FUSED.values():
        monkeypatch.delattr(optimizer, "update_step")
    yield
    program._program.cache_clear()


NETWORKS: list[tuple[str, int, dict[str, Any]]] = [
    ("optimizer=rmsprop", 16, {}),
    ("optimizer=adam", 128, {}),
    ("optimizer=sgd", 5_000, {}),
    ("optimizer=adam", 50, PARTS),
    ("optimizer=sgd", 50, {"activation": "tanh", "hidden_layers": 3}),
]


@pytest.mark.parametrize(("option", "batch_size", "model"), NETWORKS)
@pytest.mark.usefixtures("unfused")
def test_a_training_is_keras_fit_bit_for_bit_but_for_its_updates(
    option: str, batch_size: int, model: dict[str, Any]
) -> None:
    ours, history, plain, of_fit = train_twice(option, batch_size=batch_size, model=model)

    assert_equal_weights(ours.model, plain.model)
    for name, values in of_fit.history.items():
        assert values == [metrics[name] for metrics in history.epochs]


@pytest.mark.parametrize(("option", "batch_size", "model"), NETWORKS)
def test_updates_are_those_of_keras_but_for_their_rounding(
    option: str, batch_size: int, model: dict[str, Any]
) -> None:
    ours, history, plain, of_fit = train_twice(option, batch_size=batch_size, model=model)

    assert_equal_weights(ours.model, plain.model, atol=1e-6)
    for name, values in of_fit.history.items():
        assert values == pytest.approx([metrics[name] for metrics in history.epochs], rel=1e-5)


@pytest.mark.parametrize(
    ("option", "optimizer"),
    [("optimizer=adam", WARM), ("optimizer=rmsprop", COSINE), ("optimizer=sgd", COSINE)],
)
def test_a_schedule_is_that_of_keras_but_for_the_rounding_of_its_rates(
    option: str, optimizer: dict[str, Any]
) -> None:
    ours, history, plain, of_fit = train_twice(
        option, batch_size=100, model={}, optimizer=optimizer
    )

    assert_equal_weights(ours.model, plain.model, atol=1e-6)
    for name, values in of_fit.history.items():
        assert values == pytest.approx([metrics[name] for metrics in history.epochs], rel=1e-6)


@pytest.mark.parametrize(
    ("option", "batch_size", "dropout_rate"),
    [
        ("optimizer=rmsprop", 16, 0.0),  # two calls an epoch, the last batch partial
        ("optimizer=adam", 133, 0.0),  # one call, no partial batch
        ("optimizer=sgd", 100, 0.4),
    ],
)
def test_compiled_and_uncompiled_trainings_agree(
    option: str, batch_size: int, dropout_rate: float
) -> None:
    model = {"hidden_layers": 2, "dropout_rate": dropout_rate}
    settings: dict[str, Any] = {"model": model, "batch_size": batch_size}
    compiled = network(option, **settings, compile="always")
    uncompiled = network(option, **settings, compile="never")

    histories = [compiled.train(), uncompiled.train()]

    assert int(compiled.optimizer.iterations) == 2 * math.ceil(NUM_IMAGES / batch_size)
    assert_equal_weights(compiled.model, uncompiled.model, atol=2e-5)
    for ours, theirs in zip(*(history.epochs for history in histories), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


# --- smooth labels, an average of the weights, distorted images --------------------------


@pytest.mark.parametrize(("compile_", "model"), [("always", {}), ("never", PARTS)])
def test_smooth_labels_are_those_of_keras(compile_: str, model: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"batch_size": 50, "label_smoothing": 0.2, "compile": compile_}
    settings["model"] = {"dropout_rate": 0.0, **model}
    ours, plain = (network("optimizer=adam", **settings) for _ in range(2))
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.2)
    plain.model.compile(plain.optimizer, loss=loss, metrics=["accuracy"])
    validation = plain.data.validation
    assert validation is not None

    history = ours.train(seed=3)

    of_fit = plain.model.fit(
        ((images, np.eye(10)[labels]) for images, labels in batches_in_order(plain, seed=3)),
        epochs=2,
        steps_per_epoch=math.ceil(NUM_IMAGES / 50),
        shuffle=False,
        verbose=0,
    )
    assert_equal_weights(ours.model, plain.model, atol=1e-5)
    for name, values in of_fit.history.items():
        assert values == pytest.approx([metrics[name] for metrics in history.epochs], rel=1e-4)
    # What trials are compared by has no smoothing in it.
    penalty = float(sum(ours.model.losses))
    loss = evaluate(plain.model, validation).loss + penalty
    assert history.epochs[-1]["val_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("option", ["optimizer=rmsprop", "optimizer=adam", "optimizer=sgd"])
def test_an_average_of_the_weights_is_that_of_keras(option: str) -> None:
    # Keras averages weights before it bounds them, so its average may be out of bounds.
    model = {**PARTS, "max_norm": None}
    ours, history, plain, of_fit = train_twice(option, batch_size=50, model=model, ema_momentum=0.9)

    assert ours.data.validation is not None
    assert_equal_weights(ours.model, plain.model, atol=1e-6)
    losses = [metrics["loss"] for metrics in history.epochs]
    assert of_fit.history["loss"] == pytest.approx(losses, rel=1e-5)
    accuracy = evaluate(plain.model, ours.data.validation).accuracy
    assert history.epochs[-1]["val_accuracy"] == pytest.approx(accuracy)


def test_the_weights_are_trained_as_without_an_average() -> None:
    settings: dict[str, Any] = {"restore_best_weights": False, "epochs": 3}
    averaging, usual = network(ema_momentum=0.9, **settings), network(**settings)
    averages: list[npt.NDArray[Any]] = []
    trained: list[npt.NDArray[Any]] = []

    def look(epoch: int, metrics: Metrics) -> None:
        slots = [v for v in averaging.optimizer.variables if v.name.endswith("_average")]
        trained[:] = [variable.numpy() for variable in slots]
        averages[:] = averaging.model.get_weights()

    averaging.train(look)
    usual.train()

    assert len(trained) == len(usual.model.weights) == 4
    for ours, theirs in zip(trained, usual.model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(averages[0], trained[0])


def test_an_optimizer_is_left_with_the_average_that_the_model_has() -> None:
    net = network(data=first(50), ema_momentum=0.9)

    with pytest.raises(StopRun):
        net.train(stop_after_2)

    assert net.optimizer.use_ema
    pairs = averages_of(net.model, net.optimizer)
    assert len(pairs) == 4
    for average, weight in pairs:
        np.testing.assert_array_equal(average.numpy(), weight.numpy())


@pytest.mark.parametrize("ema_momentum", [0.0, 0.9])
def test_an_optimizer_of_another_average_is_refused(ema_momentum: float) -> None:
    net, other = network(ema_momentum=ema_momentum), network(ema_momentum=0.9 - ema_momentum)

    with pytest.raises(ValueError, match=rf"not one for ema_momentum={ema_momentum}\.$"):
        replace(net, optimizer=other.optimizer).train()


def stop_after_2(epoch: int, metrics: Metrics) -> None:
    if epoch == 2:
        raise StopRun


@pytest.mark.parametrize("compile_", WAYS)
@pytest.mark.parametrize("restore", [True, False])
def test_what_stops_early_has_an_average_too(compile_: str, restore: bool) -> None:
    net = network(
        data=misleading(),
        optimizer={"learning_rate": 0.01},
        epochs=60,
        batch_size=32,
        early_stopping_patience=3,
        restore_best_weights=restore,
        ema_momentum=0.8,
        compile=compile_,
    )

    history = net.train()

    assert net.data.validation is not None
    accuracies = [metrics["val_accuracy"] for metrics in history.epochs]
    saved = max(accuracies) if restore else accuracies[-1]
    assert len(accuracies) < 60
    assert max(accuracies) > accuracies[-1]
    assert evaluate(net.model, net.data.validation).accuracy == pytest.approx(saved)


def test_each_epoch_trains_on_distortions_of_its_own() -> None:
    options = ("optimizer=sgd", "augmentation=affine")
    settings: dict[str, Any] = {"batch_size": NUM_IMAGES, "model": {"dropout_rate": 0.0}}
    ours, plain = (network(*options, **settings) for _ in range(2))
    split = plain.data.train
    distort = Distortion(plain.augmentation, split.images.shape[1:])
    plain.model.compile(plain.optimizer, loss="sparse_categorical_crossentropy")

    ours.train(seed=3)

    for epoch in range(2):
        rows = order_of(NUM_IMAGES, seed=3, epoch=epoch).numpy()
        images = distort(split.images[rows], (3, epoch, 0))
        assert not np.array_equal(images, split.images[rows])
        plain.model.train_on_batch(images, split.labels[rows])
    assert_equal_weights(ours.model, plain.model)


def test_validation_images_are_not_distorted() -> None:
    net = network("augmentation=elastic", restore_best_weights=False)

    history = net.train()

    assert net.data.validation is not None
    validation = evaluate(net.model, net.data.validation)
    assert history.epochs[-1]["val_loss"] == pytest.approx(validation.loss, rel=1e-5)


# --- every image, in its order -----------------------------------------------------------


@pytest.mark.parametrize(("num_images", "batch_size"), [(33, 32), (10, 16)])
def test_the_last_partial_batch_is_trained_on(num_images: int, batch_size: int) -> None:
    data = first(num_images, validation=False)
    last = np.random.default_rng([0, 0]).permutation(num_images)[-1]
    images = data.train.images.copy()
    images[last] = 16 - images[last]
    other = replace(data, train=replace(data.train, images=images))
    settings: dict[str, Any] = {"epochs": 1, "batch_size": batch_size}
    net, changed = network(data=data, **settings), network(data=other, **settings)

    net.train()
    changed.train()

    assert int(net.optimizer.iterations) == math.ceil(num_images / batch_size)
    assert not np.array_equal(net.model.get_weights()[0], changed.model.get_weights()[0])


@pytest.mark.parametrize(
    ("compile_", "batch_size"), [("always", 5), ("never", 5), ("never", 12), ("always", 100)]
)
def test_metrics_count_every_image_once_an_epoch(compile_: str, batch_size: int) -> None:
    net = network(
        "optimizer=sgd",
        data=first(12, validation=False),
        model={"dropout_rate": 0.0},
        optimizer={"learning_rate": 1e-30},  # the weights stay
        batch_size=batch_size,
        compile=compile_,
    )
    before = evaluate(net.model, net.data.train)

    history = net.train()

    for metrics in history.epochs:
        assert metrics["loss"] == pytest.approx(before.loss, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(before.accuracy)


@pytest.mark.parametrize("other", [{"epoch": 1}, {"epoch": 0, "seed": 1}])
def test_another_seed_or_epoch_has_another_order_of_every_image(other: dict[str, int]) -> None:
    usual = order_of(100, seed=0, epoch=0).numpy().tolist()

    changed = order_of(100, **{"seed": 0, **other}).numpy().tolist()

    assert changed != usual
    assert sorted(changed) == sorted(usual) == list(range(100))


# --- repetition --------------------------------------------------------------------------


def fingerprint(compile_: str, *, seed: int = 0, **training: Any) -> dict[str, Any]:
    net = network(data=first(110), batch_size=20, compile=compile_, **training)
    history = net.train(seed=seed)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in net.model.get_weights()))
    return {"weights": digest.hexdigest(), "epochs": history.epochs}


def print_fingerprints() -> None:
    """What a process of its own runs, below."""
    initialize(threads=1, seed=0)
    print(json.dumps([fingerprint(way) for way in WAYS]))


def test_two_processes_with_an_equal_seed_train_bit_for_bit_the_same() -> None:
    here = Path(__file__)
    code = f"import {here.stem}; {here.stem}.print_fingerprints()"
    path = os.pathsep.join([str(CONF.parent), str(here.parent)])
    environment = {**os.environ, "PYTHONPATH": path}

    process = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )

    one, other = json.loads(process.stdout.splitlines()[-1]), [fingerprint(way) for way in WAYS]
    assert one == other
    assert all(len(trained["epochs"]) == 2 for trained in one)


def test_a_training_repeats_itself_whatever_the_epochs_that_follow() -> None:
    short, long = fingerprint("never", epochs=1), fingerprint("never", epochs=3)
    other = fingerprint("never", epochs=1, seed=1)

    assert long["epochs"][:1] == short["epochs"]
    assert other["weights"] != short["weights"]


# --- early stopping and divergence -------------------------------------------------------


def misleading() -> Data:
    """What is learned makes the validation worse: each of its labels is the next class."""
    data = first(300)
    assert data.validation is not None
    labels = (data.validation.labels + 1) % 10
    return replace(data, validation=replace(data.validation, labels=labels))


@pytest.mark.parametrize(("compile_", "epochs", "patience"), [("always", 60, 3), ("never", 6, 50)])
def test_a_training_ends_after_its_patience_or_its_epochs_with_the_best_weights(
    compile_: str, epochs: int, patience: int
) -> None:
    net = network(
        data=misleading(),
        optimizer={"learning_rate": 0.01},
        epochs=epochs,
        batch_size=32,
        early_stopping_patience=patience,
        compile=compile_,
    )

    history = net.train()

    assert net.data.validation is not None
    accuracies = [metrics["val_accuracy"] for metrics in history.epochs]
    best = accuracies.index(max(accuracies)) + 1
    assert best < len(accuracies) == min(best + patience, epochs)
    assert evaluate(net.model, net.data.validation).accuracy == pytest.approx(max(accuracies))


@pytest.mark.parametrize(
    ("compile_", "batch_size", "validation", "epoch"),
    [
        ("always", 32, True, 1),
        ("never", 32, True, 1),
        ("never", 5_000, True, 1),  # in the validation after the only step
        ("never", 5_000, False, 2),
    ],
)
def test_a_loss_that_is_not_finite_names_its_epoch_and_is_not_handed_on(
    compile_: str, batch_size: int, validation: bool, epoch: int
) -> None:
    net = network(
        "optimizer=sgd",
        data=first(100, validation=validation),
        optimizer={"learning_rate": 1e30},
        epochs=4,
        batch_size=batch_size,
        compile=compile_,
    )
    seen: list[int] = []

    with pytest.raises(DivergedError, match=rf"diverged in epoch {epoch}: the loss is ") as error:
        net.train(lambda epoch, metrics: seen.append(epoch))

    assert error.value.epoch == epoch
    assert seen == list(range(1, epoch))
    assert net.model.train_function is None


# --- the hook ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compile_", "validation", "names"),
    [("always", True, METRICS), ("never", False, {"loss", "accuracy"})],
)
def test_the_hook_is_given_each_epoch_with_its_metrics(
    compile_: str, validation: bool, names: set[str]
) -> None:
    net = network(data=first(60, validation=validation), epochs=3, compile=compile_)
    seen: list[tuple[int, Metrics]] = []

    history = net.train(lambda epoch, metrics: seen.append((epoch, metrics)))

    assert [epoch for epoch, _ in seen] == [1, 2, 3]
    assert [metrics for _, metrics in seen] == history.epochs
    assert all(metrics.keys() == names for metrics in history.epochs)
    assert {type(value) for metrics in history.epochs for value in metrics.values()} == {float}


def test_the_test_split_is_not_read() -> None:
    unusable = Split(
        name="train", images=np.empty((0,)), labels=np.empty((0,), np.int32), digest=""
    )
    net = network(data=replace(first(50), test=unusable))

    history = net.train()

    assert len(history.epochs) == 2


def test_the_validation_metrics_are_those_of_an_evaluation() -> None:
    net = network(data=first(50), epochs=1)

    history = net.train()

    assert net.data.validation is not None
    evaluation = evaluate(net.model, net.data.validation)
    assert history.epochs[0]["val_loss"] == pytest.approx(evaluation.loss, abs=1e-5)
    assert history.epochs[0]["val_accuracy"] == pytest.approx(evaluation.accuracy)


@pytest.mark.parametrize("error", [StopRun(), OSError("disk full")])
def test_an_error_of_the_hook_ends_the_run_and_leaves_a_plain_keras_model(
    error: Exception,
) -> None:
    net = network(data=first(50), epochs=LONG)
    before = handlers_now()
    seen: list[int] = []

    def hook(epoch: int, metrics: Metrics) -> None:
        seen.append(epoch)
        raise error

    with pytest.raises(type(error)):
        net.train(hook)

    assert seen == [1]
    assert net.model.train_function is None
    assert handlers_now() == before


# --- what is left behind -----------------------------------------------------------------


def test_a_trained_model_is_a_plain_keras_model(tmp_path: Path) -> None:
    net = network(data=first(100), model={"batch_normalization": True}, compile="always")
    net.train()
    path = tmp_path / "model.keras"

    net.model.save(path)
    loaded = keras.saving.load_model(path)

    images = net.data.test.images
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), net.model.predict(images, verbose=0)
    )
    assert net.model.train_function is None


def test_a_model_that_was_compiled_before_is_refused() -> None:
    net = network(data=first(50))
    net.train()

    with pytest.raises(ValueError, match="compiled before"):
        net.train()


def test_a_trained_model_can_go_on_with_plain_fit() -> None:
    net = network(data=first(50))
    net.train()
    steps = int(net.optimizer.iterations)

    net.model.fit(net.data.train.images, net.data.train.labels, batch_size=25, verbose=0)

    assert int(net.optimizer.iterations) == steps + 2


# --- interruption ------------------------------------------------------------------------


def kill_later(number: signal.Signals) -> None:
    """Sends a signal to this process soon, while the training goes on."""
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()


@pytest.mark.parametrize("compile_", WAYS)
def test_ctrl_c_ends_a_training_at_the_end_of_a_compiled_call(compile_: str) -> None:
    net = network(epochs=LONG, batch_size=32, compile=compile_)
    before = handlers_now()
    hooks: dict[int, Callable[[], None]] = {1: lambda: kill_later(signal.SIGINT)}

    with pytest.raises(KeyboardInterrupt) as interrupted:
        net.train(lambda epoch, metrics: hooks.get(epoch, lambda: None)())

    callbacks = {"on_train_batch_end", "on_epoch_end"}
    assert callbacks & {entry.name for entry in interrupted.traceback}
    assert int(net.optimizer.iterations) % math.ceil(NUM_IMAGES / 32) == 0
    assert handlers_now() == before


class Terminated(Exception):
    """Raised by the handler that a test installs."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def test_sigterm_goes_to_the_handler_installed_before() -> None:
    signal.signal(signal.SIGTERM, terminate)
    net = network(data=first(50), epochs=LONG)

    with pytest.raises(Terminated):
        net.train(lambda epoch, metrics: signal.raise_signal(signal.SIGTERM))

    assert signal.getsignal(signal.SIGTERM) is terminate


@pytest.mark.parametrize(
    ("second", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_first_signal_waits_and_a_second_ends_at_once(
    second: signal.Signals, error: type[BaseException]
) -> None:
    signal.signal(signal.SIGTERM, terminate)
    net = network(data=first(50), epochs=LONG)
    before = handlers_now()
    reached: list[str] = []

    def hook(epoch: int, metrics: Metrics) -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("after the first")
        signal.raise_signal(second)
        reached.append("after the second")

    with pytest.raises(error):
        net.train(hook)

    assert reached == ["after the first"]
    assert handlers_now() == before


def test_a_signal_in_the_hook_of_the_last_epoch_is_not_lost() -> None:
    net = network(data=first(50), epochs=1)
    before = handlers_now()

    with pytest.raises(KeyboardInterrupt):
        net.train(lambda epoch, metrics: signal.raise_signal(signal.SIGINT))

    assert handlers_now() == before


def test_a_signal_before_the_hook_ends_the_run_is_not_lost() -> None:
    net = network(data=first(50))

    def hook(epoch: int, metrics: Metrics) -> None:
        signal.raise_signal(signal.SIGINT)
        raise StopRun

    with pytest.raises(KeyboardInterrupt):
        net.train(hook)


def test_a_handler_that_does_not_raise_is_called_once_a_signal() -> None:
    calls: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: calls.append(number))
    net = network(data=first(50), epochs=4)
    hooks: dict[int, Callable[[], None]] = {1: lambda: signal.raise_signal(signal.SIGTERM)}

    history = net.train(lambda epoch, metrics: hooks.get(epoch, lambda: None)())

    assert calls == [signal.SIGTERM]
    assert len(history.epochs) == 4


def test_a_training_outside_the_main_thread_leaves_signals_alone() -> None:
    net = network(data=first(50))
    before = handlers_now()
    seen: list[list[Any]] = []

    thread = threading.Thread(
        target=lambda: net.train(lambda epoch, metrics: seen.append(handlers_now()))
    )
    thread.start()
    thread.join()

    assert seen == [before, before]


# --- small parts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"),
    [(1, 128, 1), (128, 128, 1), (129, 128, 2), (60_000, 128, 469)],
)
def test_an_epoch_takes_every_image(images: int, batch_size: int, steps: int) -> None:
    config = replace(compose().training, batch_size=batch_size)

    assert steps_per_epoch(images, config) == steps


@pytest.mark.parametrize(
    ("units", "ema_momentum", "least"), [(1, 0.0, 2_501), (1_000, 0.0, 2_501), (1_000, 0.9, 1_819)]
)
def test_what_is_trained_long_is_compiled(units: int, ema_momentum: float, least: int) -> None:
    net = network(model={"hidden_units": units}, ema_momentum=ema_momentum)
    config = net.config

    pays = [_pays_to_compile(net.model, config, steps) for steps in (1, least - 1, least, 10**6)]

    assert pays == [False, False, True, True]


def test_a_summary_names_the_best_epoch_and_the_pace() -> None:
    epochs = [{"val_accuracy": value} for value in (0.5, 0.9, 0.7, 0.8)]

    summary = History(restored=False, epochs=epochs, fit_seconds=2.0, images=1_000).summary

    assert summary == {
        "saved_epoch": 4,
        "saved_val_accuracy": 0.8,
        "fit_seconds": 2.0,
        "samples_per_second": 2_000.0,
        "best_val_accuracy": 0.9,
        "best_epoch": 2,
    }


def test_a_model_with_its_best_weights_is_that_of_the_best_epoch() -> None:
    epochs = [{"val_accuracy": value, "val_loss": 1 - value} for value in (0.5, 0.75, 0.7)]

    summary = History(restored=True, epochs=epochs, fit_seconds=2.0, images=1_000).summary

    assert summary["saved_epoch"] == summary["best_epoch"] == 2
    assert (summary["saved_val_accuracy"], summary["saved_val_loss"]) == (0.75, 0.25)


def test_a_summary_without_validation_has_no_best_epoch() -> None:
    summary = History(restored=False, epochs=[{"loss": 1.0}], fit_seconds=0.5, images=10).summary

    assert summary == {"saved_epoch": 1, "fit_seconds": 0.5, "samples_per_second": 20.0}


def test_the_number_of_threads_is_settled_once_a_process() -> None:
    tf.constant(0) + 1  # TensorFlow runs now
    running = tf.config.threading.get_intra_op_parallelism_threads()

    with pytest.raises(ValueError, match="start another one") as refused:
        initialize(threads=running + 1, seed=0)

    assert str(refused.value).startswith(
        f"training.threads={running + 1}: this process already runs with {running}; "
    )


def test_initializing_seeds_the_weights() -> None:
    running = tf.config.threading.get_intra_op_parallelism_threads()

    def draw(seed: int) -> list[npt.NDArray[Any]]:
        initialize(threads=running, seed=seed)
        weights: list[npt.NDArray[Any]] = build_mlp(compose().model, digits()).get_weights()
        return weights

    for first, again, other in zip(draw(1), draw(1), draw(2), strict=True):
        assert np.array_equal(first, again)
        assert first.ndim == 1 or not np.array_equal(first, other)
