"""Mean and spread over the seeds of a multirun."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from pipeline.summary import Job, summary_table


def shown(table: Table | None) -> list[str]:
    assert table
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [line.rstrip() for line in capture.get().splitlines()]


def job(
    *settings: str, seed: int, test: float = 0.5, val: float | None = None, seconds: float = 2.0
) -> Job:
    metrics = {"test_accuracy": test, "fit_seconds": seconds, "parameters": 7.0}
    if val is not None:
        metrics["saved_val_accuracy"] = val
    return Job(overrides=[*settings, f"seed={seed}"], seed=seed, metrics=metrics)


def cells(lines: Sequence[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def test_mean_and_standard_deviation_are_those_of_the_seeds() -> None:
    jobs = [job("a=1", seed=seed, test=0.97 + seed / 100, seconds=3 + seed) for seed in range(3)]

    lines = shown(summary_table(jobs))

    assert cells(lines) == [
        ["seeds", "test_accuracy", "seconds"],
        ["0,", "1,", "2", "0.9800", "±0.0100", "4", "±1"],
    ]


def test_each_settings_have_a_row_that_names_what_is_their_own() -> None:
    jobs = [
        job("data=digits", f"model.dropout_rate={rate}", seed=seed, test=rate, val=rate + seed)
        for rate in (0.1, 0.2)
        for seed in (4, 5)
    ]

    lines = shown(summary_table(jobs))

    assert [line.split()[0] for line in lines] == [
        "settings",
        "model.dropout_rate=0.1",
        "model.dropout_rate=0.2",
    ]
    assert lines[0].split()[1:] == ["seeds", "val_accuracy", "test_accuracy", "seconds"]
    assert "4.6000 ±0.7071" in lines[1]
    assert "0.2000 ±0.0000" in lines[2]


def test_a_group_of_one_has_no_spread_and_a_seed_counts_once() -> None:
    jobs = [job("a=1", seed=0), job("a=1", seed=1), job("a=1", seed=1), job("a=2", seed=0)]

    _, two, one = shown(summary_table(jobs))

    assert two.split()[:3] == ["a=1", "0,", "1"]
    assert one.split() == ["a=2", "0", "0.5000", "2"]


def test_a_figure_that_a_job_lacks_is_left_out() -> None:
    jobs = [job("a=1", seed=0, val=0.9), job("a=1", seed=1)]

    heading, _ = shown(summary_table(jobs))

    assert heading.split() == ["seeds", "test_accuracy", "seconds"]


def test_jobs_of_one_seed_have_no_summary() -> None:
    assert summary_table([]) is None
    assert summary_table([job("a=1", seed=0)]) is None
    assert summary_table([job("a=1", seed=0), job("a=2", seed=0)]) is None
