"""Runs in outline: the two ways to read them agree."""

import dataclasses
import math
from pathlib import Path

import mlflow

from pipeline.outline import query_outlines, read_outlines, search_outlines
from tests.promotions import Bench

TAGS, METRICS = ("sweep", "trial", "kind", "owner"), ("saved_val_accuracy", "parameters", "odd")


def test_the_database_says_of_each_run_what_mlflow_says(swept: Path, tmp_path: Path) -> None:
    bench = Bench(swept).copy(tmp_path)
    uri = bench.connect()
    client = mlflow.MlflowClient()
    (deleted, odd, *_) = (outline.run_id for outline in search_outlines(TAGS, METRICS))
    client.delete_run(deleted)
    client.log_metric(odd, "odd", math.nan)

    queried = read_outlines(uri, TAGS, METRICS)

    searched = {found.run_id: found for found in search_outlines(TAGS, METRICS)}
    assert len(queried) == 18
    assert queried[deleted].is_deleted
    assert math.isnan(queried[odd].metrics["odd"])
    assert {found.has_model for found in queried.values()} == {True, False}
    # NaN equals nothing, as which the two would differ.
    queried[odd], searched[odd] = (
        dataclasses.replace(found, metrics={**found.metrics, "odd": 0.0})
        for found in (queried[odd], searched[odd])
    )
    assert queried == searched
    assert {found.run_id for found in query_outlines(uri, (), ())} == queried.keys()
