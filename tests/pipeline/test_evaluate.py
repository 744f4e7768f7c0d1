"""An evaluation is that of Keras, whatever the number of images."""

import keras
import numpy as np
import pytest

from pipeline.data import Data, Split
from pipeline.evaluate import evaluate, evaluate_test

pytestmark = pytest.mark.usefixtures("tensorflow")


def split_of(num_images: int, *, num_classes: int = 10) -> Split:
    draw = np.random.default_rng(num_images)
    return Split(
        name="train",
        images=draw.integers(0, 256, (num_images, 8, 8), dtype=np.uint8),
        labels=draw.integers(0, num_classes, num_images, dtype=np.int32),
        digest="",
    )


def model_of(num_classes: int = 10, *, scale: float = 0.01, l2: float = 0.0) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8), dtype="uint8"),
            keras.layers.Rescaling(scale),
            keras.layers.Flatten(),
            keras.layers.Dense(16, "relu", kernel_regularizer=keras.regularizers.L2(l2)),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(num_classes, "softmax"),
        ]
    )
    model.compile(loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize("num_images", [1, 1_999, 2_000, 2_001, 4_321])
def test_loss_and_accuracy_are_those_of_keras(num_images: int) -> None:
    model, split = model_of(), split_of(num_images)

    evaluation = evaluate(model, split)

    loss, accuracy = model.evaluate(split.images, split.labels, verbose=0)
    assert evaluation.loss == pytest.approx(loss, abs=1e-5)
    assert evaluation.accuracy == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize(("num_images", "num_classes"), [(1, 2), (2_001, 26)])
def test_every_image_has_its_probabilities_in_the_order_of_the_split(
    num_images: int, num_classes: int
) -> None:
    model, split = model_of(num_classes), split_of(num_images, num_classes=num_classes)

    evaluation = evaluate(model, split)

    assert evaluation.split is split
    assert evaluation.probabilities.shape == (num_images, num_classes)
    assert evaluation.probabilities.dtype == np.float32
    np.testing.assert_allclose(
        evaluation.probabilities, model.predict(split.images, verbose=0), atol=1e-6
    )


def test_a_probability_of_zero_for_the_label_gives_a_finite_loss() -> None:
    model, split = model_of(scale=1e4), split_of(200)

    evaluation = evaluate(model, split)

    of_label = evaluation.probabilities[np.arange(200), split.labels]
    assert of_label.min() == 0
    assert 0 < evaluation.loss < 88  # -log of the smallest normal float32 is 87.3


def test_a_penalty_on_the_weights_is_not_part_of_the_loss() -> None:
    model, penalized, split = model_of(), model_of(l2=1.0), split_of(50)

    evaluation = evaluate(penalized, split)

    assert float(sum(penalized.losses)) > 0
    assert evaluation.loss == evaluate(model, split).loss


def test_the_test_split_is_what_is_looked_at() -> None:
    train, test = split_of(30), split_of(40)
    data = Data(
        train=train,
        validation=train,
        test=test,
        class_names=[str(label) for label in range(10)],
        pixel_max=255,
        digest="",
        source="drawn",
    )

    evaluation = evaluate_test(model_of(), data)

    assert evaluation.split is test
    assert len(evaluation.probabilities) == 40
