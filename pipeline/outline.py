"""What there is to know of every run at once, without all that MLflow's search reads of each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
import sqlalchemy
from mlflow.entities import LoggedModelStatus, ViewType
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlLoggedModel, SqlRun, SqlTag
from sqlalchemy import Connection, select

from pipeline.store import PAGE, is_server

_READY = LoggedModelStatus.READY


@dataclass(frozen=True, kw_only=True)
class Outline:
    """A run, in outline.

    Attributes:
        run_id: In MLflow.
        name: In MLflow.
        status: RUNNING, FINISHED, KILLED or FAILED.
        is_deleted: Whether it can only be restored.
        tags: Those that were asked for.
        metrics: Likewise, the last value of each.
        has_model: Whether a model that is READY was saved by it.
    """

    run_id: str
    name: str
    status: str
    is_deleted: bool
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    has_model: bool


def read_outlines(uri: str, tags: Collection[str], metrics: Collection[str]) -> dict[str, Outline]:
    """Every run by its id, deleted ones too.

    MLflow's search of 10,000 runs takes half a minute: a database is asked itself.

    Args:
        uri: Of the store, which is open and has its tables.
        tags: Names of those that are read.
        metrics: Likewise.
    """
    found = search_outlines(tags, metrics) if is_server(uri) else query_outlines(uri, tags, metrics)
    return {outline.run_id: outline for outline in found}


def search_outlines(tags: Collection[str], metrics: Collection[str]) -> Iterator[Outline]:
    """Likewise, by MLflow's own search: of any store, and the only way of a server's."""
    client = mlflow.MlflowClient()
    experiments = client.search_experiments(view_type=ViewType.ALL)
    ids = [experiment.experiment_id for experiment in experiments]
    have = {
        model.source_run_id
        for model in _pages(lambda token: client.search_logged_models(ids, page_token=token))
        if model.status == _READY
    }
    for run in _pages(
        lambda token: client.search_runs(ids, "", ViewType.ALL, PAGE, page_token=token)
    ):
        yield Outline(
            run_id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            is_deleted=run.info.lifecycle_stage == "deleted",
            tags={name: text for name, text in run.data.tags.items() if name in tags},
            metrics={name: value for name, value in run.data.metrics.items() if name in metrics},
            has_model=run.info.run_id in have,
        )


def _pages(read: Any) -> Iterator[Any]:
    token = None
    while True:
        page = read(token)
        yield from page
        token = page.token
        if not token:
            return


def query_outlines(uri: str, tags: Collection[str], metrics: Collection[str]) -> Iterator[Outline]:
    """Likewise, by three queries of MLflow's tables."""
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        given, values = _tags(connection, tags), _metrics(connection, metrics)
        of = SqlLoggedModel.__table__.c
        is_ready = (of.status == _READY.to_int()) & (of.lifecycle_stage == "active")
        have = set(connection.scalars(select(of.source_run_id).where(is_ready)))
        of = SqlRun.__table__.c
        columns = select(of.run_uuid, of.name, of.status, of.lifecycle_stage)
        for run_id, name, status, stage in connection.execute(columns):
            yield Outline(
                run_id=run_id,
                name=name or "",
                status=status,
                is_deleted=stage == "deleted",
                tags=given.get(run_id, {}),
                metrics=values.get(run_id, {}),
                has_model=run_id in have,
            )


def _tags(connection: Connection, names: Collection[str]) -> Mapping[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    of = SqlTag.__table__.c
    columns = select(of.run_uuid, of.key, of.value).where(of.key.in_(names))
    for run_id, key, value in connection.execute(columns):
        found[run_id][key] = value
    return found


def _metrics(connection: Connection, names: Collection[str]) -> Mapping[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = defaultdict(dict)
    of = SqlLatestMetric.__table__.c
    columns = select(of.run_uuid, of.key, of.value, of.is_nan).where(of.key.in_(names))
    for run_id, key, value, is_nan in connection.execute(columns):
        found[run_id][key] = math.nan if is_nan else value
    return found
