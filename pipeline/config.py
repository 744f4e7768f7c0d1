"""What one run is made of: names, types and ranges. The defaults stand in `conf/`."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "gelu", "silu", "elu", "selu", "tanh", "sigmoid")
INITIALIZERS = (
    "auto",
    "glorot_uniform",
    "glorot_normal",
    "he_uniform",
    "he_normal",
    "lecun_uniform",
    "lecun_normal",
)
LOADERS = ("arrays", "digits")
SCHEDULES = ("constant", "cosine")
COMPILE = ("auto", "always", "never")
# Keys that a run recorded by an earlier version may lack, with what such a run did: nothing of it.
LATER: dict[str, dict[str, float]] = {
    "model": {"input_dropout_rate": 0.0},
    "training": {"label_smoothing": 0.0, "ema_momentum": 0.0},
    "augmentation": {
        "rotation": 0.0,
        "shift": 0.0,
        "scale": 0.0,
        "shear": 0.0,
        "elastic": 0.0,
        "elastic_sigma": 0.14,
    },
}
# Addresses that MLflow can record runs at: a server, or a database; a file of its own.
STORES = r"https?://[^/]+.*|sqlite:///.*[^/.]|(postgresql|mysql|mssql)(\+\w+)?://.+"
ALIASES = ("champion", "challenger")
PREDICTION_FILES = (".csv", ".parquet")


def check(rule_holds: bool, key: str, rule: str, value: object) -> None:
    """Raises a `ValueError` that states the key, the rule and the value, unless the rule holds."""
    if not rule_holds:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    check(value in choices, key, f"one of {', '.join(choices)}", value)


def check_at_least(key: str, value: float, low: float) -> None:
    check(low <= value < math.inf, key, f"at least {low}", value)


def check_name(key: str, value: str) -> None:
    """A name may become a path or an address: letters, digits, dot, hyphen and underscore."""
    safe = re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) and value.strip(".")
    check(bool(safe), key, "1 to 64 of the characters A-Z a-z 0-9 . _ -", value)


def check_address(key: str, value: str) -> None:
    """An address whose password `without_password` finds; the error does not show it."""
    if re.search(r"://[^:/\s]*:[^@]*\s.*@", value):
        raise ValueError(f"{key} must have no white space in its password: write it as %20.")


def without_password(text: str) -> str:
    """Hides the password of every address in a text: `postgresql://me:***@host/db`."""
    text = re.sub(r"(://[^:/\s]*):\S+@", r"\1:***@", text)
    return re.sub(r"([?&](?:password|token)=)[^&\s]+", r"\1***", text)


# What moves a terminal's cursor, hides text or turns it round; a line and a tab are none of it.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """A text that others may have written, as a terminal may be given it."""
    return _UNPRINTABLE.sub("\ufffd", text)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Values by dotted name, spelt as in YAML; lists are left out."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, bool):
            yield f"{prefix}{name}", {None: "null", True: "true", False: "false"}[value]
        elif not isinstance(value, list):
            yield f"{prefix}{name}", str(value)


def complete(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings of a run by dotted name, with those that its version did not have."""
    return {**dict(flatten(LATER)), **settings}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and labels, and how training images become train and validation. `conf/data/`.

    Attributes:
        name: Name of the data set, shown on the run.
        loader: `arrays` (`.npz` or IDX files) or `digits` (bundled with scikit-learn).
        path: File or folder of the arrays; null looks in the caches, then downloads.
        sources: Alternatives in the order tried, each the addresses that make up one full copy.
        sha256: SHA-256 of train images, train labels, test images and test labels in their
            uncompressed IDX form; null accepts any content.
        pixel_max: Pixel value that the model scales to 1.
        class_names: Name of each label; null shows the numbers.
        train_size: Training images to use, a stratified draw; null uses all.
        validation_size: Images held out of the training images: a whole number, or a fraction
            of them below 1.
        split_seed: Seed of the draws, apart from the run's seed so that runs stay comparable.
    """

    name: str
    loader: str
    path: str | None
    sources: list[list[str]]
    sha256: list[str] | None
    pixel_max: float
    class_names: list[str] | None
    train_size: int | None
    validation_size: int | float
    split_seed: int

    def __post_init__(self) -> None:
        check_name("data.name", self.name)
        check_choice("data.loader", self.loader, LOADERS)
        check(
            self.sha256 is None or len(self.sha256) == 4,
            "data.sha256",
            "null or 4 digests",
            self.sha256,
        )
        check(
            0 < self.pixel_max <= 2**32,
            "data.pixel_max",
            "positive and at most 2**32",
            self.pixel_max,
        )
        if self.train_size is not None:
            check_at_least("data.train_size", self.train_size, 1)
        check(
            self.validation_size >= 0
            and (self.validation_size < 1 or self.validation_size % 1 == 0),
            "data.validation_size",
            "a fraction in [0, 1) or a whole number of images",
            self.validation_size,
        )
        check(0 <= self.split_seed < 2**32, "data.split_seed", "in [0, 2**32)", self.split_seed)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Multilayer perceptron. Defaults: `conf/model/mlp.yaml`.

    Attributes:
        hidden_units: Width of each hidden layer, at least 1.
        hidden_layers: Number of hidden layers, at most 100; 0 is multinomial logistic regression.
        dropout_rate: Fraction of hidden activations zeroed while training, in [0, 1).
        input_dropout_rate: Likewise, of the pixels.
        activation: Of each hidden layer.
        initializer: Of the hidden weights; `auto` suits the activation.
        batch_normalization: Between each hidden layer's product and its activation.
        l2: Factor of the sum of squared weights added to the loss; 0 is none.
        max_norm: Bound on the norm of the weights into one unit; null is none.
    """

    hidden_units: int
    hidden_layers: int
    dropout_rate: float
    input_dropout_rate: float
    activation: str
    initializer: str
    batch_normalization: bool
    l2: float
    max_norm: float | None

    def __post_init__(self) -> None:
        check_at_least("model.hidden_units", self.hidden_units, 1)
        check(
            0 <= self.hidden_layers <= 100, "model.hidden_layers", "in [0, 100]", self.hidden_layers
        )
        for name in ("dropout_rate", "input_dropout_rate"):
            rate = getattr(self, name)
            check(0 <= rate < 1, f"model.{name}", "in [0, 1)", rate)
        check_choice("model.activation", self.activation, ACTIVATIONS)
        check_choice("model.initializer", self.initializer, INITIALIZERS)
        check_at_least("model.l2", self.l2, 0)
        if self.max_norm is not None:
            check(
                math.isfinite(self.max_norm) and self.max_norm > 0,
                "model.max_norm",
                "positive or null",
                self.max_norm,
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What every optimizer has. Defaults: `conf/optimizer/`.

    Attributes:
        name: Which optimizer.
        learning_rate: Step size at the peak of the schedule, positive.
        weight_decay: Fraction of each weight subtracted a step, times the learning rate; 0 is none.
        schedule: `constant`, or `cosine` down to 0 at the last step.
        warmup_epochs: Epochs over which a cosine schedule first rises from 0.
    """

    name: str
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup_epochs: float

    def __post_init__(self) -> None:
        check(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "optimizer.learning_rate",
            "positive",
            self.learning_rate,
        )
        check_at_least("optimizer.weight_decay", self.weight_decay, 0)
        check_choice("optimizer.schedule", self.schedule, SCHEDULES)
        check_at_least("optimizer.warmup_epochs", self.warmup_epochs, 0)
        if self.warmup_epochs and self.schedule != "cosine":
            raise ValueError(
                f"optimizer.warmup_epochs={self.warmup_epochs} needs optimizer.schedule=cosine, "
                f"got {self.schedule!r}."
            )


@dataclass(frozen=True, kw_only=True)
class RMSpropConfig(OptimizerConfig):
    """RMSprop (Hinton 2012). `rho`: decay of the mean square; both in [0, 1)."""

    rho: float
    momentum: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.rho < 1, "optimizer.rho", "in [0, 1)", self.rho)
        check(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)


@dataclass(frozen=True, kw_only=True)
class AdamConfig(OptimizerConfig):
    """Adam (Kingma and Ba 2015), decoupled weight decay; both decays in [0, 1)."""

    beta_1: float
    beta_2: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.beta_1 < 1, "optimizer.beta_1", "in [0, 1)", self.beta_1)
        check(0 <= self.beta_2 < 1, "optimizer.beta_2", "in [0, 1)", self.beta_2)


@dataclass(frozen=True, kw_only=True)
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent; `nesterov` needs a momentum, which is in [0, 1)."""

    momentum: float
    nesterov: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, "optimizer.momentum", "in [0, 1)", self.momentum)
        if self.nesterov:
            check(self.momentum > 0, "optimizer.momentum", "positive with nesterov", self.momentum)


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    "rmsprop": RMSpropConfig,
    "adam": AdamConfig,
    "sgd": SGDConfig,
}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how fast. Defaults: `conf/training/default.yaml`.

    Attributes:
        epochs: Passes over the training images, at most.
        batch_size: Images a step; the last step of an epoch takes what is left.
        early_stopping_patience: Epochs without a better `val_accuracy` before the training
            stops; null trains all epochs.
        restore_best_weights: Whether the model ends with the weights of the epoch with the best
            `val_accuracy`, where there is validation, or with the last.
        label_smoothing: Part of each label that is spread evenly over all classes, in [0, 1).
        ema_momentum: Part of the average of the weights that a step leaves, at most 0.9999. The
            average is validated and saved in place of the weights; 0 is none. The moments of
            batch normalization stay those of the weights that are trained.
        compile: The steps by XLA: `always`, `never`, or `auto` where it repays its compilation.
            Distortions are always compiled.
        threads: Processor threads of TensorFlow. Results are repeatable for equal counts.
    """

    epochs: int
    batch_size: int
    early_stopping_patience: int | None
    restore_best_weights: bool
    label_smoothing: float
    ema_momentum: float
    compile: str
    threads: int

    def __post_init__(self) -> None:
        check_at_least("training.epochs", self.epochs, 1)
        check_at_least("training.batch_size", self.batch_size, 1)
        if self.early_stopping_patience is not None:
            check_at_least("training.early_stopping_patience", self.early_stopping_patience, 1)
        smoothing, momentum = self.label_smoothing, self.ema_momentum
        check(0 <= smoothing < 1, "training.label_smoothing", "in [0, 1)", smoothing)
        check(0 <= momentum <= 0.9999, "training.ema_momentum", "in [0, 0.9999]", momentum)
        check_choice("training.compile", self.compile, COMPILE)
        check(1 <= self.threads <= 1024, "training.threads", "in [1, 1024]", self.threads)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """How the training images are distorted, anew each epoch. Defaults: `conf/augmentation/`.

    The first four are each the largest of a uniform draw to both sides; 0 is none. An image is
    shifted and bent, then scaled, turned and slanted.

    Attributes:
        rotation: Degrees, at most 180.
        shift: Of either axis, as a fraction of its side, at most 1.
        scale: Change of the size of either axis, as a fraction of it, below 1.
        shear: Degrees, below 90.
        elastic: Root mean square of the shift of a pixel in a smooth random field, along either
            axis, as a fraction of its side, at most 1.
        elastic_sigma: Standard deviation of the Gaussian that smooths that field, as a fraction of
            the side, in [0.05, 1].
    """

    rotation: float
    shift: float
    scale: float
    shear: float
    elastic: float
    elastic_sigma: float

    def __post_init__(self) -> None:
        for holds, name, rule in (
            (0 <= self.rotation <= 180, "rotation", "in [0, 180]"),
            (0 <= self.shift <= 1, "shift", "in [0, 1]"),
            (0 <= self.scale < 1, "scale", "in [0, 1)"),
            (0 <= self.shear < 90, "shear", "in [0, 90)"),
            (0 <= self.elastic <= 1, "elastic", "in [0, 1]"),
            (0.05 <= self.elastic_sigma <= 1, "elastic_sigma", "in [0.05, 1]"),
        ):
            check(holds, f"augmentation.{name}", rule, getattr(self, name))

    @property
    def distorts(self) -> bool:
        """Whether it changes an image at all."""
        return any((self.rotation, self.shift, self.scale, self.shear, self.elastic))


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are recorded. Defaults: `conf/tracking/`.

    Attributes:
        uri: Address of an MLflow server or database; null is SQLite in `directory`.
        directory: Folder of the local store and its artifacts.
        experiment: MLflow experiment, created when missing.
        run_name: Name of the run; null makes one from the settings.
        system_metrics: Whether to record processor, memory and disk use while training.
        figures: Whether to draw digits, curves, confusion and mistakes.
    """

    uri: str | None
    directory: str
    experiment: str
    run_name: str | None
    system_metrics: bool
    figures: bool

    def __post_init__(self) -> None:
        check_name("tracking.experiment", self.experiment)
        check(
            self.uri is None or re.fullmatch(STORES, self.uri) is not None,
            "tracking.uri",
            "null or an address such as http://127.0.0.1:5000",
            self.uri,
        )
        if self.uri:
            check_address("tracking.uri", self.uri)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole. Defaults: `conf/run.yaml`.

    Attributes:
        seed: Of the initial weights, the shuffling, the dropout and the distortions.
        evaluate_test: Whether this run looks at the test split, once, at its end.
    """

    data: DataConfig
    model: ModelConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    augmentation: AugmentationConfig
    tracking: TrackingConfig
    seed: int
    evaluate_test: bool

    def __post_init__(self) -> None:
        check(0 <= self.seed < 2**32, "seed", "in [0, 2**32)", self.seed)
        if self.training.early_stopping_patience is not None and not self.data.validation_size:
            raise ValueError(
                f"training.early_stopping_patience={self.training.early_stopping_patience} needs "
                f"validation images, got data.validation_size={self.data.validation_size}: "
                "set training.early_stopping_patience=null."
            )
        if not self.evaluate_test and not self.data.validation_size:
            raise ValueError(
                "evaluate_test=false needs validation images, or nothing is measured, "
                f"got data.validation_size={self.data.validation_size}."
            )
        if self.optimizer.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"optimizer.warmup_epochs must be below training.epochs={self.training.epochs}, "
                f"got {self.optimizer.warmup_epochs}."
            )


@dataclass(frozen=True, kw_only=True)
class UIConfig:
    """What the UI shows. Defaults: `conf/ui.yaml`.

    Attributes:
        run: Id of the run to show first; null: every experiment.
        port: To listen on; where it is taken, the next free one.
    """

    tracking: TrackingConfig
    run: str | None
    port: int

    def __post_init__(self) -> None:
        check(1024 <= self.port <= 65_000, "port", "in [1024, 65000]", self.port)


@dataclass(frozen=True, kw_only=True)
class PlaceConfig:
    """Where the data of a recorded run is now: the section `data`.

    Attributes:
        path: File or folder; null: where the run found it.
    """

    path: str | None


@dataclass(frozen=True, kw_only=True)
class ThreadsConfig:
    """What may be otherwise in a repetition: its section `training`.

    Attributes:
        threads: Processor threads of TensorFlow; null: as many as the run had.
    """

    threads: int | None

    def __post_init__(self) -> None:
        if self.threads is not None:
            check(1 <= self.threads <= 1024, "training.threads", "in [1, 1024]", self.threads)


@dataclass(frozen=True, kw_only=True)
class RepeatConfig:
    """A run to repeat. Defaults: `conf/repeat.yaml`.

    Attributes:
        run: Its id in MLflow.
    """

    tracking: TrackingConfig
    training: ThreadsConfig
    data: PlaceConfig
    run: str | None

    def __post_init__(self) -> None:
        check(bool(self.run), "run", "the id of a recorded run", self.run)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What predicts, and where to. Defaults: `conf/predict.yaml`.

    Attributes:
        name: Of the registered model; null: the only one there is.
        alias: One of `ALIASES`.
        array: Name of the images in an `.npz` file; null: the usual names, or the only ones.
        batch_size: Images at once, at least 1.
        out: File of all predictions, as `PREDICTION_FILES` end; null: none.
    """

    tracking: TrackingConfig
    name: str | None
    alias: str
    array: str | None
    batch_size: int
    out: str | None

    def __post_init__(self) -> None:
        check_choice("alias", self.alias, ALIASES)
        check_at_least("batch_size", self.batch_size, 1)
        endings = " or ".join(PREDICTION_FILES)
        is_known = self.out is None or self.out.lower().endswith(PREDICTION_FILES)
        check(is_known, "out", f"a file that ends in {endings}", self.out)
