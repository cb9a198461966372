"""Intervals of the metrics of a sweep, and how each setting compares with a baseline on the same samples.

Read from samples.csv of the runs. Of experiments that differ in their seed alone, a sample (a prompt) has the mean of
its values over the seeds: it is one sample, however often it is drawn. Settings are compared over the seeds that both
have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qexp.errors import ConfigError, DiskError, choices, did_you_mean
from qexp.metrics.registry import Metric, all_metrics, metrics_in
from qexp.report.table import prepare
from qexp.results.intervals import mean_over_seeds, metric_intervals, sampled_metrics
from qexp.results.rows import Row
from qexp.results.samples import Values, read_samples
from qexp.results.uncertainty import Interval, compare_paired

BASELINE, OTHER_SAMPLES, OTHER_N, NO_SAMPLES = "baseline", "other samples", "other n", "no samples"


def read_all_samples(rows: Iterable[Row]) -> Iterator[str]:
    """Give each row its `samples`, metric -> values; yields a line for each file that cannot be read."""
    for row in rows:
        try:
            row["samples"] = read_samples(row["folder"]) if row["status"] == "done" and row["folder"] else {}
        except DiskError as error:
            row["samples"] = {}
            yield f"{error} (this report has no intervals of it)"


def prepare_compared(rows: list[Row], baseline: str | None = None) -> list[Row]:
    """Return `prepare(rows)` with the intervals of each row, and how it compares with the baseline.

    intervals: metric -> interval. versus: metric -> better, worse, undecided, or why it is not compared. `rows` get
    them, too: the intervals of each run alone, and the comparison of its group.

    Raises: ConfigError for a baseline that is none of them.
    """
    for row in rows:
        row["intervals"] = _intervals(row)
    prepared = prepare(rows)
    for row in prepared:
        if "members" in row:
            row["intervals"] = _intervals(row)
    if baseline is not None:
        base = find_baseline(prepared, baseline)
        by_number = {row["number"]: row for row in rows}
        for row in prepared:
            row["versus"] = _versus(row, base)
            for member in row.get("members", [row]):
                by_number[member["number"]]["versus"] = row["versus"]
    return prepared


def find_baseline(prepared: Sequence[Row], name: str) -> Row:
    """Return the row of a run's key, or of a name in the table: 'bitsandbytes nf4', with its setting if it needs one.

    Raises: ConfigError if there is none, or more than one.
    """
    found = [row for row in prepared if name in _names(row)]
    done = [row for row in found if row["status"] == "done"]
    if len(done) == 1:
        return done[0]
    if done:
        named = ((f"#{row['number']}" if "copy" in row else row["key"], row) for row in done)  # copies share their key
        keys = choices(f"{key} ({' '.join(filter(None, (row['offload'], row['setting'])))})" for key, row in named)
        raise ConfigError(f"--baseline {name!r} names {len(done)} rows; give a key: {keys}")
    if found:
        raise ConfigError(f"--baseline {name!r} has no result ({found[0]['status']}); choose one that is done")
    names = sorted({str(row["backend"]) for row in prepared if row["status"] == "done"})
    raise ConfigError(
        f"--baseline {name!r} is none of these{did_you_mean(name, names)}; use {choices(names)}, or a key"
    )


def comparison_notes(prepared: Sequence[Row]) -> list[str]:
    """Return what the columns of intervals and comparisons mean, and which values cannot be compared."""
    notes = []
    if any(row.get("intervals") for row in prepared):
        notes.append("95%: bootstrap interval (BCa) of the mean over images, prompts or windows of a text.")
    base = next((row for row in prepared if BASELINE in row.get("versus", {}).values()), None)
    if base is not None:
        name = " ".join(filter(None, (base["backend"], base["offload"], base["setting"])))
        notes.append(f"vs: compared with {name} ({base['key']}) on the same samples, by a paired bootstrap at 95%.")
    for metric in all_metrics().values():
        counts = {
            row["metrics"].get(metric.count_name) for row in prepared if row["metrics"].get(metric.name) is not None
        }
        if metric.set_of and metric.header and len(counts) > 1:
            listed = ", ".join(f"{count:g}" for count in sorted(count for count in counts if count is not None))
            notes.append(f"{metric.header} depends on n ({listed}): values of different n are not compared.")
    return notes


def _names(row: Row) -> set[str]:
    members = row.get("members", [row])
    keys = ({str(member["key"]) for member in members} | {f"#{member['number']}" for member in members}) - {""}
    parts = (row["model"], row["backend"], row["setting"])
    return keys | {str(row["label"]), str(row["backend"]), " ".join(filter(None, parts)), " ".join(parts[1:]).strip()}


def samples_of(row: Row, metric: str) -> Values:
    """Return the values of a row, of all its seeds."""
    members = row.get("members", [row])
    return {key: value for member in members for key, value in member.get("samples", {}).get(metric, {}).items()}


def _intervals(row: Row) -> dict[str, Interval]:
    return metric_intervals(
        {metric.name: samples_of(row, metric.name) for metric in sampled_metrics(row["metrics"])}, row["metrics"]
    )


def _versus(row: Row, base: Row) -> dict[str, str]:
    """Metric -> how the row compares with the baseline; only metrics that both have."""
    found = {}
    for metric in metrics_in(row["metrics"]):
        if metric.name not in row["metrics"] or metric.name not in base["metrics"] or not metric.better:
            continue
        if metric.set_of and row["metrics"].get(metric.count_name) != base["metrics"].get(metric.count_name):
            found[metric.name] = OTHER_N
        elif metric.sample_kind:
            is_base = (row["key"], row.get("copy")) == (base["key"], base.get("copy"))
            found[metric.name] = BASELINE if is_base else _verdict(row, base, metric)
    return found


def _verdict(row: Row, base: Row, metric: Metric) -> str:
    ours, theirs = samples_of(row, metric.name), samples_of(base, metric.name)
    if not ours or not theirs:
        return NO_SAMPLES
    seeds = {seed for seed, _ in ours} & {seed for seed, _ in theirs}
    ours, theirs = (_of_seeds(values, seeds) for values in (ours, theirs))
    if not seeds or ours.keys() != theirs.keys():
        return OTHER_SAMPLES
    first, second = mean_over_seeds(ours), mean_over_seeds(theirs)
    weights = {name: (first[name][1] + second[name][1]) / 2 for name in first}
    return compare_paired(_values(first), _values(second), metric.better, weights).verdict


def _of_seeds(values: Values, seeds: set[str]) -> Values:
    return {key: value for key, value in values.items() if key[0] in seeds}


def _values(means: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    return {name: value for name, (value, _) in means.items()}
