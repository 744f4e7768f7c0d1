"""Ranges, names and passwords: what a configuration refuses, and how it says so."""

import math
import string
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import (
    ACTIVATIONS,
    COMPILE,
    INITIALIZERS,
    LOADERS,
    SCHEDULES,
    AdamConfig,
    AugmentationConfig,
    DataConfig,
    ModelConfig,
    RMSpropConfig,
    RunConfig,
    SGDConfig,
    TrackingConfig,
    TrainingConfig,
    check_name,
    without_password,
)

DATA = DataConfig(
    name="mnist",
    loader="arrays",
    path=None,
    sources=[],
    sha256=None,
    pixel_max=255.0,
    class_names=None,
    train_size=None,
    validation_size=10000,
    split_seed=0,
)
MODEL = ModelConfig(
    hidden_units=512,
    hidden_layers=2,
    dropout_rate=0.2,
    input_dropout_rate=0.0,
    activation="relu",
    initializer="auto",
    batch_normalization=False,
    l2=0.0,
    max_norm=None,
)
# A cosine schedule, or a warm-up would be refused whatever its length.
COSINE: dict[str, Any] = {
    "learning_rate": 0.001,
    "weight_decay": 0.0,
    "schedule": "cosine",
    "warmup_epochs": 0.0,
}
RMSPROP = RMSpropConfig(name="rmsprop", rho=0.9, momentum=0.0, **COSINE)
ADAM = AdamConfig(name="adam", beta_1=0.9, beta_2=0.999, **COSINE)
SGD = SGDConfig(name="sgd", momentum=0.9, nesterov=False, **COSINE)
TRAINING = TrainingConfig(
    epochs=20,
    batch_size=128,
    early_stopping_patience=5,
    restore_best_weights=True,
    label_smoothing=0.0,
    ema_momentum=0.0,
    compile="auto",
    threads=1,
)
AUGMENTATION = AugmentationConfig(
    rotation=0.0, shift=0.0, scale=0.0, shear=0.0, elastic=0.0, elastic_sigma=0.14
)
TRACKING = TrackingConfig(
    uri=None,
    directory="mlruns",
    experiment="digits",
    run_name=None,
    system_metrics=False,
    figures=True,
)
RUN = RunConfig(
    data=DATA,
    model=MODEL,
    optimizer=RMSPROP,
    training=TRAINING,
    augmentation=AUGMENTATION,
    tracking=TRACKING,
    seed=0,
    evaluate_test=True,
)

NAN, INF = math.nan, math.inf
ONE = math.nextafter(1.0, 0.0)  # the last number below 1
TINY = math.nextafter(0.0, 1.0)  # the first above 0
ABOVE = math.nextafter(180, 181)
HUGE = 10**400  # no float holds it
DECAY: tuple[list[Any], list[Any]] = ([0.0, 0.5, ONE], [-TINY, 1.0, NAN, INF, -INF])
NAMES = "1 to 64 of the characters A-Z a-z 0-9 . _ -"
GOOD_NAMES = ["a", "A" * 64, "fashion-mnist_2.0", "-", "_", ".hidden", "..a"]
BAD_NAMES = [
    "",
    ".",
    "..",
    "." * 64,
    "a" * 65,
    "../x",
    "../../etc/passwd",
    "a/b",
    "/a",
    "a\\b",
    "C:",
    "~",
    "a b",
    " a",
    "a\n",
    "\na",
    "a\x00",
    "$HOME",
    "a;b",
    "a%2fb",
    "été",
    "数字",
    "１",  # noqa: RUF001  # full width: a digit to str.isdigit
    "а",  # noqa: RUF001  # Cyrillic
    "a\u202eb",
    "🙂",
]


def one_of(choices: tuple[str, ...]) -> str:
    return f"one of {', '.join(choices)}"


# Section, its name, field, rule, values just inside, values just outside.
RANGES: list[tuple[Any, str, str, str, list[Any], list[Any]]] = [
    (DATA, "data", "name", NAMES, GOOD_NAMES, BAD_NAMES),
    (DATA, "data", "loader", one_of(LOADERS), [*LOADERS], ["", "Digits", "csv"]),
    (DATA, "data", "sha256", "null or 4 digests", [None, ["a"] * 4], [[], ["a"] * 3, ["a"] * 5]),
    (
        DATA,
        "data",
        "pixel_max",
        "positive and at most 2**32",
        [TINY, 1.0, 255, 2**32],
        [0.0, -TINY, 2**32 + 1, NAN, INF, -INF, HUGE],
    ),
    (DATA, "data", "train_size", "at least 1", [None, 1, 60000, HUGE], [0, -1]),
    (
        DATA,
        "data",
        "validation_size",
        "a fraction in [0, 1) or a whole number of images",
        [0, 0.0, TINY, ONE, 1, 1.0, 2.0, 10000, HUGE],
        [-1, -5, -1.0, -0.5, 1.5, NAN, INF, -INF, -HUGE],
    ),
    # scikit-learn takes no other seeds.
    (DATA, "data", "split_seed", "in [0, 2**32)", [0, 2**32 - 1], [-1, 2**32, HUGE]),
    (MODEL, "model", "hidden_units", "at least 1", [1, 512, HUGE], [0, -1]),
    (MODEL, "model", "hidden_layers", "in [0, 100]", [0, 1, 100], [-1, 101, HUGE]),
    (MODEL, "model", "dropout_rate", "in [0, 1)", *DECAY),
    (MODEL, "model", "input_dropout_rate", "in [0, 1)", *DECAY),
    (MODEL, "model", "activation", one_of(ACTIVATIONS), [*ACTIVATIONS], ["", "ReLU", "linear"]),
    (MODEL, "model", "initializer", one_of(INITIALIZERS), [*INITIALIZERS], ["", "zeros"]),
    (MODEL, "model", "l2", "at least 0", [0.0, TINY, 1e3], [-TINY, NAN, INF, -INF]),
    (
        MODEL,
        "model",
        "max_norm",
        "positive or null",
        [None, TINY, 3.0],
        [0.0, -TINY, NAN, INF, -INF],
    ),
    (
        RMSPROP,
        "optimizer",
        "learning_rate",
        "positive",
        [TINY, 1e30],
        [0.0, -TINY, NAN, INF, -INF],
    ),
    (RMSPROP, "optimizer", "weight_decay", "at least 0", [0.0, TINY, 0.1], [-TINY, NAN, INF]),
    (RMSPROP, "optimizer", "schedule", one_of(SCHEDULES), [*SCHEDULES], ["", "linear"]),
    (RMSPROP, "optimizer", "warmup_epochs", "at least 0", [0.0, TINY, 2.5], [-TINY, NAN, INF]),
    (RMSPROP, "optimizer", "rho", "in [0, 1)", *DECAY),
    (RMSPROP, "optimizer", "momentum", "in [0, 1)", *DECAY),
    (ADAM, "optimizer", "beta_1", "in [0, 1)", *DECAY),
    (ADAM, "optimizer", "beta_2", "in [0, 1)", *DECAY),
    (SGD, "optimizer", "momentum", "in [0, 1)", *DECAY),
    (TRAINING, "training", "epochs", "at least 1", [1, 1000, HUGE], [0, -1]),
    (TRAINING, "training", "batch_size", "at least 1", [1, 60000, HUGE], [0, -1]),
    (TRAINING, "training", "early_stopping_patience", "at least 1", [None, 1, 100], [0, -1]),
    (TRAINING, "training", "label_smoothing", "in [0, 1)", *DECAY),
    (
        TRAINING,
        "training",
        "ema_momentum",
        "in [0, 0.9999]",
        [0.0, TINY, 0.9999],
        [-TINY, math.nextafter(0.9999, 1), NAN],
    ),
    (TRAINING, "training", "compile", one_of(COMPILE), [*COMPILE], ["", "yes", "Auto"]),
    (TRAINING, "training", "threads", "in [1, 1024]", [1, 64, 1024], [0, -1, 1025]),
    (AUGMENTATION, "augmentation", "rotation", "in [0, 180]", [0.0, 180.0], [-TINY, ABOVE, NAN]),
    (AUGMENTATION, "augmentation", "shift", "in [0, 1]", [0.0, 1.0], [-TINY, 1 / ONE, NAN]),
    (AUGMENTATION, "augmentation", "scale", "in [0, 1)", *DECAY),
    (AUGMENTATION, "augmentation", "shear", "in [0, 90)", [0.0, 89.9], [-TINY, 90.0, NAN]),
    (AUGMENTATION, "augmentation", "elastic", "in [0, 1]", [0.0, 1.0], [-TINY, 1 / ONE, INF]),
    (
        AUGMENTATION,
        "augmentation",
        "elastic_sigma",
        "in [0.05, 1]",
        [0.05, 1.0],
        [math.nextafter(0.05, 0), 1 / ONE, NAN],
    ),
    (TRACKING, "tracking", "experiment", NAMES, GOOD_NAMES, BAD_NAMES),
    (RUN, "", "seed", "in [0, 2**32)", [0, 2**32 - 1], [-1, 2**32, HUGE]),
]
INSIDE = [
    pytest.param(section, field, value, id=f"{name}.{field}={value!r:.20}".lstrip("."))
    for section, name, field, _, inside, _ in RANGES
    for value in inside
]
OUTSIDE = [
    pytest.param(
        section,
        field,
        f"{name}.{field}".lstrip("."),
        rule,
        value,
        id=f"{name}.{field}={value!r:.20}".lstrip("."),
    )
    for section, name, field, rule, _, outside in RANGES
    for value in outside
]


@pytest.mark.parametrize(("section", "field", "value"), INSIDE)
def test_a_value_just_inside_its_range_is_kept(section: Any, field: str, value: object) -> None:
    config = replace(section, **{field: value})

    assert getattr(config, field) == value


@pytest.mark.parametrize(("section", "field", "key", "rule", "value"), OUTSIDE)
def test_a_value_just_outside_its_range_is_refused_with_key_rule_and_value(
    section: Any, field: str, key: str, rule: str, value: object
) -> None:
    with pytest.raises(ValueError) as error:
        replace(section, **{field: value})

    assert str(error.value) == f"{key} must be {rule}, got {value!r}."


@pytest.mark.parametrize(
    "section", [DATA, MODEL, RMSPROP, ADAM, SGD, TRAINING, AUGMENTATION, TRACKING]
)
def test_every_number_has_a_range(section: Any) -> None:
    numbers = {f.name for f in fields(section) if f.type in (int, float, int | None, float | None)}

    ranged = {field for tested, _, field, *_ in RANGES if isinstance(section, type(tested))}

    inherited = {"learning_rate", "weight_decay", "warmup_epochs"}  # tested on RMSprop
    assert numbers - inherited <= ranged


@pytest.mark.parametrize("optimizer", [RMSPROP, ADAM, SGD])
def test_every_optimizer_checks_what_all_of_them_have(optimizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^optimizer\.learning_rate must be positive, got 0\.0\.$"
    ):
        replace(optimizer, learning_rate=0.0)


# --- rules between fields ----------------------------------------------------------------


def test_a_warmup_needs_a_cosine_schedule() -> None:
    with pytest.raises(ValueError) as error:
        replace(ADAM, schedule="constant", warmup_epochs=1.0)

    assert str(error.value) == (
        "optimizer.warmup_epochs=1.0 needs optimizer.schedule=cosine, got 'constant'."
    )


@pytest.mark.parametrize("warmup_epochs", [0.0, 2.999])
def test_a_warmup_shorter_than_the_training_is_kept(warmup_epochs: float) -> None:
    optimizer = replace(ADAM, warmup_epochs=warmup_epochs)

    config = replace(RUN, optimizer=optimizer, training=replace(TRAINING, epochs=3))

    assert config.optimizer == optimizer


@pytest.mark.parametrize("warmup_epochs", [3.0, 4.0])
def test_a_warmup_as_long_as_the_training_is_refused(warmup_epochs: float) -> None:
    optimizer = replace(ADAM, warmup_epochs=warmup_epochs)

    with pytest.raises(ValueError) as error:
        replace(RUN, optimizer=optimizer, training=replace(TRAINING, epochs=3))

    assert str(error.value) == (
        f"optimizer.warmup_epochs must be below training.epochs=3, got {warmup_epochs}."
    )


def test_nesterov_needs_a_momentum() -> None:
    with pytest.raises(ValueError) as error:
        replace(SGD, nesterov=True, momentum=0.0)

    assert str(error.value) == "optimizer.momentum must be positive with nesterov, got 0.0."


@pytest.mark.parametrize(("nesterov", "momentum"), [(True, TINY), (False, 0.0)])
def test_nesterov_with_and_plain_descent_without_momentum_are_kept(
    nesterov: bool, momentum: float
) -> None:
    config = replace(SGD, nesterov=nesterov, momentum=momentum)

    assert (config.nesterov, config.momentum) == (nesterov, momentum)


@pytest.mark.parametrize("validation_size", [0, 0.0])
def test_early_stopping_needs_validation_images(validation_size: float) -> None:
    with pytest.raises(ValueError) as error:
        replace(RUN, data=replace(DATA, validation_size=validation_size))

    assert str(error.value) == (
        "training.early_stopping_patience=5 needs validation images, "
        f"got data.validation_size={validation_size}: set training.early_stopping_patience=null."
    )


@pytest.mark.parametrize("validation_size", [0, 0.0])
def test_a_run_that_measures_nothing_is_refused(validation_size: float) -> None:
    training = replace(TRAINING, early_stopping_patience=None)
    data = replace(DATA, validation_size=validation_size)

    with pytest.raises(ValueError, match="evaluate_test=false needs validation images"):
        replace(RUN, data=data, training=training, evaluate_test=False)


@pytest.mark.parametrize("uri", ["", "127.0.0.1:5000", "mlruns"])
def test_an_address_without_its_scheme_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match=r"tracking\.uri must be null or an address such as http:"):
        replace(TRACKING, uri=uri)


def test_all_images_may_be_trained_on_without_early_stopping() -> None:
    training = replace(TRAINING, early_stopping_patience=None)

    config = replace(RUN, data=replace(DATA, validation_size=0), training=training)

    assert config.data.validation_size == 0


# --- names -------------------------------------------------------------------------------

SAFE = string.ascii_letters + string.digits + "._-"


@given(st.text(SAFE, min_size=1, max_size=64).filter(lambda name: name.strip(".")))
def test_a_safe_name_is_kept_and_stays_inside_its_folder(name: str) -> None:
    check_name("data.name", name)

    folder = Path("/store")
    assert (folder / name).resolve().parent == folder


@given(
    before=st.text(max_size=20),
    odd=st.characters().filter(lambda character: character not in SAFE),
    after=st.text(max_size=20),
)
def test_a_name_with_one_odd_character_is_refused(before: str, odd: str, after: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.name must be 1 to 64"):
        check_name("data.name", before + odd + after)


@given(st.text(SAFE, min_size=65, max_size=300))
def test_a_name_over_64_characters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.name must be 1 to 64"):
        check_name("data.name", name)


@given(st.text())
def test_the_refusal_of_a_name_is_one_printable_line(name: str) -> None:
    with pytest.raises(ValueError) as error:
        check_name("data.name", f"{name}/")

    assert str(error.value).isprintable()


# --- passwords ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se:cr:et@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://me:s@cr@t@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:se/cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:s%40cr%3At@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:geheimß密🔑@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me@company:secret@host/db", "postgresql://me@company:***@host/db"),
        ("postgresql+psycopg://me:secret@host/db", "postgresql+psycopg://me:***@host/db"),
        ("redis://:secret@host", "redis://:***@host"),
        ("https://me:secret@host/path", "https://me:***@host/path"),
        (r"tracking.uri=https\://me\:secret@host", r"tracking.uri=https\://me\:***@host"),
        (
            "'tracking.uri=https://me:secret@host' seed=1",
            "'tracking.uri=https://me:***@host' seed=1",
        ),
        ("https://a:b@c\nhttps://d:e@f", "https://a:***@c\nhttps://d:***@f"),
        ("https://a:b@c or https://d:e@f", "https://a:***@c or https://d:***@f"),
    ],
)
def test_a_password_is_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sqlite:///mlruns/mlflow.db",
        "http://127.0.0.1:5000",
        "http://127.0.0.1:5000/#/experiments/1",
        "http://127.0.0.1:5000 written by me@host",
        "postgresql://me@host:5432/db",
        "python -m pipeline.run data.path=a@b.npz optimizer.learning_rate=3e-4",
    ],
)
def test_a_text_without_a_password_is_left_as_it_is(text: str) -> None:
    assert without_password(text) == text


VISIBLE = st.characters(exclude_categories=("C", "Z"))
USERS = st.text(VISIBLE.filter(lambda character: character not in ":/"))
HOSTS = st.text(string.ascii_lowercase + string.digits + ".-", min_size=1)


@given(user=USERS, password=st.text(VISIBLE, min_size=1), host=HOSTS, said=st.booleans())
def test_no_password_remains_in_an_address_alone_or_in_a_sentence(
    user: str, password: str, host: str, said: bool
) -> None:
    sentence = ["{}", "could not reach {} in 10 s"][said]

    shown = without_password(sentence.format(f"postgresql://{user}:{password}@{host}/db"))

    assert shown == sentence.format(f"postgresql://{user}:***@{host}/db")


# --- augmentation ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rotation", "shift", "scale", "shear", "elastic"])
def test_each_amount_alone_distorts(name: str) -> None:
    assert replace(AUGMENTATION, **{name: 0.01}).distorts


def test_no_amount_distorts_nothing_whatever_the_smoothness() -> None:
    assert not replace(AUGMENTATION, elastic_sigma=0.5).distorts
