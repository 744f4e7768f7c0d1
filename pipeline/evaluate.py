"""What a trained model is worth on a split; the only reader of the test split."""

from dataclasses import dataclass

import keras
import numpy as np
import numpy.typing as npt

from pipeline.data import Data, Split

_CHUNK = 2_000  # images at once: bounds the memory of the activations


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result on one split.

    Attributes:
        split: What was evaluated.
        loss: Mean categorical cross-entropy in nats, without penalties on the weights.
        accuracy: Fraction of images whose most probable class is their label.
        probabilities: `[n, num_classes]`, float32.
    """

    split: Split
    loss: float
    accuracy: float
    probabilities: npt.NDArray[np.float32]


def evaluate(model: keras.Model, split: Split) -> Evaluation:
    """Evaluates every image of the split once, without dropout."""
    probabilities = np.concatenate(
        [
            np.asarray(model(split.images[start : start + _CHUNK], training=False))
            for start in range(0, len(split), _CHUNK)
        ]
    )
    of_label = probabilities[np.arange(len(split)), split.labels]
    tiny = np.finfo(np.float32).tiny
    return Evaluation(
        split=split,
        loss=float(-np.log(np.maximum(of_label, tiny), dtype=np.float64).mean()),
        accuracy=float((probabilities.argmax(axis=1) == split.labels).mean()),
        probabilities=probabilities,
    )


def evaluate_test(model: keras.Model, data: Data) -> Evaluation:
    """Looks at the test split; `Run.count_test_look` has counted it."""
    return evaluate(model, data.test)
