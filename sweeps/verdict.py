"""What a promotion found, as text: in the terminal, on its run, as the card of the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from pipeline.config import flatten
from pipeline.pages import version_page
from sweeps.candidates import Retrained, Source
from sweeps.display import number
from sweeps.gate import CONFIDENCE, Check, Comparison, interval
from sweeps.judge import Judgement, Test

if TYPE_CHECKING:  # or MLflow is imported, or what takes a second
    from matplotlib.figure import Figure

    from pipeline.registry import Version
    from pipeline.store import Recorded

# What a reader of the card must know, whatever the figures.
LIMITS = (
    "It knows images like those it was trained on, and answers with one of its classes whatever "
    "it is shown.",
    "Its probabilities were not calibrated: a high one is no guarantee.",
    "The intervals hold the noise of the images and of the seeds tried, on one kind of processor.",
)


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """The candidates of a promotion, and which of their runs is the challenger.

    Attributes:
        source: What is promoted.
        retrained: Each candidate, in the order of the search.
        finalist: The one with the best mean; None where none is left.
        judgement: On its median run, the challenger.
        command: Command line that repeats the promotion.
    """

    source: Source
    retrained: Sequence[Retrained]
    finalist: Retrained | None
    judgement: Judgement
    command: str

    @property
    def seed(self) -> int | None:
        return self.finalist.median[0] if self.finalist else None

    @property
    def run(self) -> Recorded | None:
        return self.finalist.median[1] if self.finalist else None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a promotion came to, with its evidence.

    Attributes:
        decision: `PROMOTE`, `HOLD` or `REJECT`.
        name: Of the registered model.
        challenge: What was promoted.
        champion: Before the decision.
        comparison: None without a champion that could be compared with.
        checks: What was asked, and answered.
    """

    decision: str
    name: str
    challenge: Challenge
    champion: Version | None
    comparison: Comparison | None
    checks: Sequence[Check]

    @property
    def evidence(self) -> str:
        """In one line, for the ledger."""
        found, test = self.comparison, self.challenge.judgement.looked
        gain = "the first champion" if self.champion is None else "not comparable"
        if found:
            gain = (
                f"{found.gain:+.4f} ({found.low:+.4f} to {found.high:+.4f}), p {found.p_value:.2g}"
            )
        return f"{gain}; test {test.accuracy:.4f} (look {test.look})" if test else gain


def luck(found: Retrained, *, of_sweep: bool = True) -> str:
    """How much of the best score was luck, in a sentence."""
    candidate = found.candidate
    searched = candidate.value(candidate.run)
    spread = f" ±{found.spread:.4f}" if found.spread is not None else ""
    who = f"The search's best, {candidate.title}," if of_sweep else candidate.title.capitalize()
    share = round(found.luck, 4)
    part = f"{number(share)} of it was luck" if share > 0 else "none of it was luck"
    return (
        f"{who} had {candidate.objective} {number(searched)}; on "
        f"{len(found.runs)} fresh seeds it has {number(found.mean)}{spread} on average: {part}."
    )


def candidates_table(retrained: Sequence[Retrained]) -> Table:
    """A row a candidate."""
    table = Table(box=None, pad_edge=False)
    objective = retrained[0].candidate.objective
    for heading in ("candidate", f"searched {objective}", "fresh seeds", "luck", "each seed"):
        left = heading in ("candidate", "each seed")
        table.add_column(heading, justify="left" if left else "right")
    for cells in _rows(retrained):
        table.add_row(*cells)
    return table


def _rows(retrained: Sequence[Retrained]) -> Iterator[tuple[str, ...]]:
    for found in retrained:
        candidate = found.candidate
        spread = f" ±{found.spread:.4f}" if found.runs and found.spread is not None else ""
        failed = [f"seed {seed} failed: {why}" for seed, why in found.failures.items()]
        yield (
            candidate.title,
            number(candidate.value(candidate.run)),
            f"{number(found.mean)}{spread}" if found.runs else "",
            f"{found.luck:+.4f}" if found.runs else "",
            ", ".join([*map(number, found.values), *failed]),
        )


def headline(verdict: Verdict, version: Version | None) -> str:
    """The decision in a line."""
    finalist = verdict.challenge.finalist
    challenger, champion = "", verdict.champion
    if finalist:
        challenger = f"{finalist.candidate.title}, seed {verdict.challenge.seed}"
    stays = f"{champion} stays champion" if champion else f"{verdict.name} still has no champion"
    if verdict.decision != "PROMOTE":
        was = f"the challenger was {challenger}" if challenger else "no candidate is left"
        worse = ", which is worse" if verdict.comparison and verdict.comparison.high < 0 else ""
        return f"{verdict.decision}: {stays}; {was}{worse}"
    instead = f"in place of version {champion.number}" if champion else "its first"
    return f"PROMOTE: {version} ({challenger}) is the champion, {instead}"


def lines(verdict: Verdict) -> list[str]:
    """Each check with its answer."""
    return [
        f"{'yes' if check.holds else 'NO '}  {check.name}: {check.evidence}"
        for check in verdict.checks
    ]


def describe_test(test: Test) -> str:
    low, high = interval(test.accuracy, test.images)
    return (
        f"{test.accuracy:.4f} ({100 * CONFIDENCE:.4g} % interval {low:.4f} to {high:.4f}, "
        f"{test.images:,} images, look {test.look} at this test split)"
    )


def as_json(verdict: Verdict, version: Version | None) -> str:
    """All of it, for programs."""
    challenge, champion = verdict.challenge, verdict.champion
    finalist, test = challenge.finalist, challenge.judgement.looked
    record: dict[str, Any] = {
        "decision": verdict.decision,
        "model": verdict.name,
        "version": version.number if version else None,
        "champion": champion.number if champion else None,
        "source": {"title": challenge.source.title, "run_id": challenge.source.run.run_id},
        "objective": challenge.source.objective,
        "candidates": [_candidate_record(found) for found in challenge.retrained],
        "finalist": finalist and finalist.candidate.run.run_id,
        "challenger": challenge.run and challenge.run.run_id,
        "seed": challenge.seed,
        "comparison": verdict.comparison and asdict(verdict.comparison),
        "checks": [asdict(check) for check in verdict.checks],
        "test": test and {**asdict(test), "interval": interval(test.accuracy, test.images)},
        "command": challenge.command,
    }
    return json.dumps(record, indent=2) + "\n"


def _candidate_record(found: Retrained) -> dict[str, Any]:
    candidate = found.candidate
    return {
        "title": candidate.title,
        "run_id": candidate.run.run_id,
        "searched": candidate.value(candidate.run),
        "mean": found.mean if found.runs else None,
        "standard_deviation": found.spread if found.runs else None,
        "luck": found.luck if found.runs else None,
        "seeds": {
            seed: {"run_id": run.run_id, "value": candidate.value(run)}
            for seed, run in found.runs.items()
        },
        "failures": dict(found.failures),
    }


def as_markdown(verdict: Verdict, version: Version | None) -> str:
    """For the promotion's run in the UI."""
    challenge = verdict.challenge
    return "\n\n".join(
        [
            f"**{headline(verdict, version)}**",
            *(
                [f"See [{version}]({version_page(version.name, version.number)})."]
                if version
                else []
            ),
            "\n".join(f"- {line}" for line in lines(verdict)),
            _table(challenge.retrained),
            *(
                [luck(challenge.retrained[0], of_sweep=challenge.source.is_sweep)]
                if challenge.retrained[0].runs
                else []
            ),
            f"Repeat: `{challenge.command}`",
        ]
    )


def _table(retrained: Sequence[Retrained]) -> str:
    objective = retrained[0].candidate.objective
    heading = f"| candidate | searched {objective} | fresh seeds | luck | each seed |"
    rows = (
        "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        for cells in _rows(retrained)
    )
    return "\n".join([heading, "|---|---|---|---|---|", *rows])


def seeds_figure(retrained: Sequence[Retrained]) -> Figure:
    """Of each candidate what the search found, what fresh seeds came to, and their mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.4 + 0.45 * len(retrained)), layout="constrained")
    axes = figure.add_subplot()
    for row, found in enumerate(retrained):
        searched = found.candidate.value(found.candidate.run)
        labels = ("in the search", "on a fresh seed", "their mean") if row == 0 else ("_", "_", "_")
        axes.plot(searched, row, "D", color="tab:orange", label=labels[0])
        apart = [
            row + 0.08 * (place - (len(found.runs) - 1) / 2) for place in range(len(found.runs))
        ]
        axes.plot(found.values, apart, "o", color="tab:blue", ms=5, label=labels[1])
        if found.runs:
            axes.plot(found.mean, row, "|", color="black", ms=18, mew=2, label=labels[2])
    axes.set_yticks(range(len(retrained)), [found.candidate.title for found in retrained])
    axes.set_ylim(len(retrained) - 0.5, -0.5)
    axes.set_xlabel(retrained[0].candidate.objective)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def model_card(verdict: Verdict) -> str:
    """What whoever uses the model should know, in Markdown."""
    challenge = verdict.challenge
    run, found, test = challenge.run, challenge.finalist, challenge.judgement.looked
    assert run is not None and found is not None
    config = found.candidate.config
    settings = [
        f"| `{name}` | {value} |"
        for section in ("data", "model", "optimizer", "training", "augmentation")
        for name, value in flatten({section: asdict(getattr(config, section))})
    ]
    accuracy = run.metrics["saved_val_accuracy"]
    _, images = run.validation or ("", 0)
    low, high = interval(accuracy, images)
    metrics = [
        f"- validation accuracy {accuracy:.4f} ({100 * CONFIDENCE:.4g} % interval {low:.4f} to "
        f"{high:.4f}, {images:,} images)",
        *([f"- test accuracy {describe_test(test)}"] if test else []),
        f"- over the seeds {', '.join(map(str, found.runs))}: {found.candidate.objective} "
        f"{number(found.mean)}" + (f" ±{found.spread:.4f}" if found.spread is not None else ""),
        f"- {run.metrics['parameters']:,.0f} parameters",
    ]
    origin = [
        f"- trained by run `{run.run_id}`, seed {challenge.seed}, of {found.candidate.title} of "
        f"{challenge.source.title}",
        f"- data `{config.data.name}`, SHA-256 `{run.tags['data.sha256']}`",
        f"- repeat: `{run.tags['command']}`",
        f"- promoted by: `{challenge.command}`",
    ]
    takes = "Takes raw pixels `[n, height, width]`, answers with probabilities `[n, classes]`."
    return "\n\n".join(
        [
            f"A multilayer perceptron for {config.data.name}. {takes}",
            "## Metrics\n\n" + "\n".join(metrics),
            "## Evidence\n\n" + "\n".join(f"- {line}" for line in lines(verdict)),
            "## Origin\n\n" + "\n".join(origin),
            "## Limits\n\n" + "\n".join(f"- {limit}" for limit in LIMITS),
            "## Settings\n\n| | |\n|---|---|\n" + "\n".join(settings),
        ]
    )
