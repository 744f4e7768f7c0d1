"""The multilayer perceptron and its optimizer."""

from pathlib import Path
from typing import Any

import keras
import psutil

from pipeline.config import (
    AdamConfig,
    ModelConfig,
    OptimizerConfig,
    RMSpropConfig,
    SGDConfig,
)
from pipeline.data import Data

# He et al. 2015 for units that are zero on one side, LeCun 1998 for self-normalizing ones
# (Klambauer et al. 2017), Glorot and Bengio 2010 for symmetric ones.
_INITIALIZERS = {
    "relu": "he_normal",
    "gelu": "he_normal",
    "silu": "he_normal",
    "elu": "he_normal",
    "selu": "lecun_normal",
    "tanh": "glorot_uniform",
    "sigmoid": "glorot_uniform",
}
# float32: weight, gradient and two moments; these before a call, lent to the program and while they
# are computed; the copy of the best epoch; an average of the weights, and lent. With one moment and
# no average, ten were measured, to which RMSprop's spare array came.
_BYTES_A_PARAMETER = 15 * 4


def build_mlp(config: ModelConfig, data: Data) -> keras.Model:
    """Builds the network for the images and classes of a data set.

    Returns:
        A model from raw pixels `[batch, height, width]`, of the data's dtype, to probabilities
        `[batch, num_classes]`, float32.

    Raises:
        ValueError: It would not fit into the memory that is free.
    """
    images, num_classes = data.train.images, len(data.class_names)
    height, width = images.shape[1:]
    check_memory(config, num_inputs=height * width, num_classes=num_classes)
    layers: list[keras.Layer] = [
        keras.layers.Rescaling(1.0 / data.pixel_max),
        keras.layers.Flatten(),
    ]
    if config.input_dropout_rate:
        layers.append(keras.layers.Dropout(config.input_dropout_rate))
    for _ in range(config.hidden_layers):
        layers += _hidden_layer(config)
    layers.append(_dense(config, num_classes, "glorot_uniform", activation="softmax"))
    return keras.Sequential(
        [keras.Input((height, width), dtype=images.dtype.name), *layers], name="mlp"
    )


def _hidden_layer(config: ModelConfig) -> list[keras.Layer]:
    initializer = config.initializer
    if initializer == "auto":
        initializer = _INITIALIZERS[config.activation]
    layers: list[keras.Layer] = [
        _dense(config, config.hidden_units, initializer, use_bias=not config.batch_normalization)
    ]
    if config.batch_normalization:
        layers.append(keras.layers.BatchNormalization())
    layers.append(keras.layers.Activation(config.activation))
    if config.dropout_rate:
        layers.append(keras.layers.Dropout(config.dropout_rate))
    return layers


def _dense(config: ModelConfig, units: int, initializer: str, **settings: object) -> keras.Layer:
    return keras.layers.Dense(
        units,
        kernel_initializer=initializer,
        kernel_regularizer=keras.regularizers.L2(config.l2) if config.l2 else None,
        kernel_constraint=keras.constraints.MaxNorm(config.max_norm) if config.max_norm else None,
        **settings,
    )


def build_optimizer(
    config: OptimizerConfig, *, steps_per_epoch: int, epochs: int, ema_momentum: float
) -> keras.Optimizer:
    """Builds the optimizer; a schedule ends with the last step of the last epoch.

    Args:
        config: Of the optimizer.
        steps_per_epoch: Of the training.
        epochs: Likewise.
        ema_momentum: Of the average of the weights; 0: none.
    """
    rate: float | keras.optimizers.schedules.LearningRateSchedule = config.learning_rate
    if config.schedule == "cosine":
        steps = steps_per_epoch * epochs
        warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), steps - 1)
        rate = keras.optimizers.schedules.CosineDecay(
            initial_learning_rate=0.0 if warmup_steps else config.learning_rate,
            decay_steps=steps - warmup_steps,
            warmup_target=config.learning_rate if warmup_steps else None,
            warmup_steps=warmup_steps,
        )
    common: dict[str, Any] = {"learning_rate": rate, "weight_decay": config.weight_decay or None}
    if ema_momentum:
        common |= {"use_ema": True, "ema_momentum": ema_momentum}
    match config:
        case RMSpropConfig():
            return keras.optimizers.RMSprop(rho=config.rho, momentum=config.momentum, **common)
        case AdamConfig():
            return keras.optimizers.Adam(beta_1=config.beta_1, beta_2=config.beta_2, **common)
        case SGDConfig():
            return keras.optimizers.SGD(
                momentum=config.momentum, nesterov=config.nesterov, **common
            )
    raise TypeError(f"no optimizer for {type(config).__name__}")


def count_parameters(config: ModelConfig, *, num_inputs: int, num_classes: int) -> int:
    """Parameters of the network, running moments of batch normalization included."""
    per_unit = 4 if config.batch_normalization else 1  # gamma, beta, two moments; or a bias
    units, layers = config.hidden_units, config.hidden_layers
    if not layers:
        return (num_inputs + 1) * num_classes
    first = (num_inputs + per_unit) * units
    others = (layers - 1) * (units + per_unit) * units
    return first + others + (units + 1) * num_classes


def check_memory(config: ModelConfig, *, num_inputs: int, num_classes: int) -> None:
    """Refuses a network that cannot be trained in the memory that is free.

    Raises:
        ValueError: It needs more than is free.
    """
    count = count_parameters(config, num_inputs=num_inputs, num_classes=num_classes)
    needed, free = count * _BYTES_A_PARAMETER, _free_memory()
    if needed > free:
        raise ValueError(
            f"model.hidden_units={config.hidden_units} with model.hidden_layers="
            f"{config.hidden_layers} makes {count:,} parameters, which take "
            f"{_gib(needed)} GiB to train; {_gib(free)} GiB are free."
        )


def _gib(size: int) -> str:
    """Bytes in GiB; of a network without bounds they are more than a float holds."""
    return f"{size / 2**30:,.1f}" if size < 2**64 else f"{size // 2**30:,}"


def _free_memory() -> int:
    """Bytes free on the machine, or in the container's limit where that is less."""
    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit: no such file, or it says "max"
        return free
    return min(free, limit - used)
