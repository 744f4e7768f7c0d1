"""What a clean process finds of a model that is to be promoted: does what is served hold?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import DataConfig, TrackingConfig

if TYPE_CHECKING:  # or TensorFlow is imported
    from pipeline.data import Array, Data, Split
    from pipeline.store import Predictions, Recorded

_CHUNK = 2_000  # images at once: bounds the memory of the activations
_TOLERANCE = 2e-3  # relative, of a loss: recorded in half precision


@dataclass(frozen=True, kw_only=True)
class Test:
    """A look at the test split.

    Attributes:
        accuracy: A fraction.
        images: How many.
        look: Looks of all runs so far, this one included.
    """

    accuracy: float
    images: int
    look: int


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one model.

    Attributes:
        problem: Why it must not be served; empty where it answers as was recorded.
        images: Validation images on which that was compared.
        example: Classes predicted for its input example, to be found again by a rollback.
        looked: At the test split; None where there is a problem: it would decide nothing.
    """

    problem: str
    images: int = 0
    example: tuple[int, ...] = ()
    looked: Test | None = None


def judge(tracking: TrackingConfig, data: DataConfig, run_id: str, threads: int) -> Judgement:
    """Loads the model of a run as a server does, and compares its answers with the recorded ones.

    Looks at the test split too, once a run: a second judgement finds what the first recorded.

    Args:
        tracking: Where the run is.
        data: Of the run.
        run_id: Finished, with predictions.
        threads: Of TensorFlow.
    """
    from pipeline.data import load
    from pipeline.registry import RefusedModelError, example_of, load_served, logged_model
    from pipeline.store import connect, read_predictions, read_run
    from pipeline.train import initialize

    connect(tracking)
    initialize(threads=threads, seed=0)
    run, given = read_run(run_id), load(data)
    recorded = read_predictions(run)
    if recorded is None or given.validation is None:
        return Judgement(problem="its predictions are not recorded")
    try:
        model_id = logged_model(run)
    except ValueError as error:
        raise ValueError(f"{error} Delete that run in MLflow, and it is trained again.") from error
    uri = f"models:/{model_id}"
    try:
        predict = load_served(uri)
        problem = _differ(predict, given.validation, recorded)
        example = predict(example_of(uri)).argmax(axis=1)
    except RefusedModelError as error:
        return Judgement(problem=str(error))
    if problem:
        return Judgement(problem=problem)
    return Judgement(
        problem="",
        images=len(given.validation),
        example=tuple(map(int, example)),
        looked=_look(tracking, run, given, uri),
    )


def _differ(predict: Callable[[Array], Array], validation: Split, recorded: Predictions) -> str:
    """How the answers differ from those recorded; empty where they do not."""
    if not np.array_equal(validation.labels, recorded.labels):
        return "its predictions were recorded of other images"
    probabilities = np.concatenate(
        [
            predict(validation.images[start : start + _CHUNK])
            for start in range(0, len(validation), _CHUNK)
        ]
    )
    others = int(np.sum(probabilities.argmax(axis=1) != recorded.classes))
    if others:
        return f"it predicts {others} of {len(validation):,} validation images otherwise"
    of_label = probabilities[np.arange(len(validation)), validation.labels]
    losses = -np.log(np.maximum(of_label, np.finfo(np.float32).tiny))
    if not np.allclose(losses, recorded.losses, rtol=_TOLERANCE, atol=_TOLERANCE):
        return "its probabilities of the validation images differ from those recorded"
    return ""


def _look(tracking: TrackingConfig, run: Recorded, data: Data, uri: str) -> Test:
    from pipeline.registry import load_model
    from pipeline.run import look_at_test
    from pipeline.store import open_store
    from pipeline.tracking import Run

    known = dict(run.metrics)
    if "test_images" not in known:
        recorder = Run(run_id=run.run_id, name=run.name, store=open_store(tracking))
        found, evaluation = look_at_test(recorder, load_model(uri), data)
        if "test_look" not in found:
            raise ConnectionError("the tracking store is away: looks cannot be counted.")
        known |= {**found, "test_images": len(evaluation.split)}
        recorder.log_metrics({name: known[name] for name in (*found, "test_images")})
    return Test(
        accuracy=known["test_accuracy"],
        images=int(known["test_images"]),
        look=int(known["test_look"]),
    )
