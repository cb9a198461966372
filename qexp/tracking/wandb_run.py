"""A Weights & Biases run from a finished run folder.

    config    the nested configuration, and the environment under `env`
    summary   every metric, <metric>_low and _high for the ends of its 95 % interval, status, reason, message, seconds
    history   steps/<column> per generation step: time, memory, error against the reference
    media     images/grid, images/reference, images/difference; tables: layers (of a roundtrip), compared_texts,
              samples, sensitivity, with a map of it as images/sensitivity
    run       name: readable label, with the settings that vary in its sweep; group: sweep; job type: task; tags: model,
              backend, offload, and the user's

Names are cut to what W&B takes, and variables such as WANDB_RUN_ID, which another program's run may have left in the
environment, change none of this.

The run's id is the run key, so logging a folder again overwrites the same run. It is not resumed: a log is always the
whole folder, and a resumed run appends it to what is there, every step twice. Offline the older .wandb file is
replaced. wandb is kept quiet, and away from the working directory and the home directory: all it writes is below
<folder>/wandb.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qexp.config.schema import RunConfig, TrackingConfig
from qexp.config.wandb_names import MAX_TAG, cut
from qexp.errors import ConfigError
from qexp.results.intervals import metric_intervals
from qexp.results.labels import backend_label, experiment_name, run_label
from qexp.results.run_folder import RunFolder
from qexp.results.samples import read_samples
from qexp.system.files import read_csv, read_json, read_yaml
from qexp.tracking.session import clear_errors, require_login, wandb_session

INIT_TIMEOUT_SECONDS = 20.0  # without an answer, wandb gives up starting an online run
FINISH_TIMEOUT_SECONDS = 120.0  # and uploading one
IMAGES = ("grid", "reference", "difference")
ENDS = ("low", "high")
TABLES = ("layers", "compared_texts", "samples", "sensitivity")


def log_run(folder: Path, config: RunConfig, sweep_name: str | None, settings: str = "") -> str | None:
    """Log the run in `folder` as `config.tracking` says; prints and returns its path (offline) or address (online).

    settings: those that vary in its sweep, for its name.
    None for tracking=none. A run that is not done is logged as failed, with its reason.
    Raises: ConfigError without an API key, UnsupportedError if the server does not answer in time.
    """
    tracking = config.tracking
    if tracking.mode == "none":
        return None
    folder = folder.absolute()
    status = RunFolder(folder).read_status()
    failed = status is None or status.status != "done"
    subject = f"tracking.mode={tracking.mode}: the run in {folder} is not logged to project {tracking.project}"
    remedy = "use tracking=offline, and `wandb sync` the run folder later"
    with clear_errors(subject, remedy), wandb_session(folder, tracking.mode) as wandb:
        container = read_yaml(folder / "config.yaml") or config.to_container()
        names = {
            "run_id": folder.name,
            "run_name": cut(experiment_name(run_label(container), settings)),
            "run_group": None if sweep_name is None else cut(sweep_name),
            "run_job_type": container["task"]["name"],
            "run_tags": tuple(run_tags(container, tracking)),
        }
        values = container | {"env": read_json(folder / "env.json") or {}}
        with open_run(wandb, folder, tracking, names, values, exit_code=int(failed)) as run:
            _log_history(run, folder)
            _log_media(wandb, run, folder)
            run.summary.update(_run_summary(folder))
        place = place_of(run, tracking)
    remove_older(folder, keep=Path(run.settings.sync_dir))
    print(f"W&B run: {place.removeprefix(f'{Path.cwd()}/')}", flush=True)
    return place


def place_of(run: Any, tracking: TrackingConfig) -> str:
    """Return where a run is: its address (online), or its folder (offline)."""
    return str(run.url) if tracking.mode == "online" else str(run.settings.sync_dir)


@contextmanager
def open_run(
    wandb: Any,
    folder: Path,
    tracking: TrackingConfig,
    names: Mapping[str, Any],
    config: Mapping[str, Any],
    exit_code: int = 0,
) -> Iterator[Any]:
    """Open a run that is written below `folder` and finished at the end; it has failed if an error ends it.

    names: run_id, run_name, run_group, run_job_type, run_tags.
    Raises: ConfigError without an API key, or for a name that W&B refuses.
    """
    run = _start(wandb, folder, tracking, names, config)
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish(exit_code=exit_code)


def _start(
    wandb: Any, folder: Path, tracking: TrackingConfig, names: Mapping[str, Any], config: Mapping[str, Any]
) -> Any:
    """Return an initialized run, not the global one: a run that the calling program has open stays as it is."""
    if tracking.mode == "online":
        require_login(wandb)
    try:
        return wandb.init(settings=_settings(wandb, folder, tracking, names), config=dict(config))
    except (ValueError, wandb.errors.UsageError) as error:
        text = error.errors()[0]["msg"] if hasattr(error, "errors") else error  # pydantic lists what it refuses
        given = (
            f"tracking.project={tracking.project}, tracking.entity={tracking.entity}, tracking.tags={[*tracking.tags]}"
        )
        raise ConfigError(f"{given}: W&B refuses one of them ({text}); change it") from error


def _settings(wandb: Any, folder: Path, tracking: TrackingConfig, names: Mapping[str, Any]) -> Any:
    """Return settings without output and without facts about this process: another one ran the experiment."""
    off = ("x_disable_stats", "x_disable_meta", "x_disable_machine_info", "disable_git", "disable_code")
    return wandb.Settings(
        mode=tracking.mode,
        root_dir=str(folder),
        project=tracking.project,
        **({"entity": tracking.entity} if tracking.entity else {}),  # else WANDB_ENTITY, or the account's own
        **names,
        reinit="create_new",  # a run that the calling program has open stays open
        init_timeout=INIT_TIMEOUT_SECONDS,
        finish_timeout=FINISH_TIMEOUT_SECONDS,
        finish_timeout_raises=True,  # or an upload that was cut off would look complete
        silent=True,
        console="off",  # worker.log has it
        label_disable=True,
        **dict.fromkeys(off, True),
        **dict.fromkeys(("save_code", "x_save_requirements", "symlink"), False),
    )


def run_tags(container: Mapping[str, Any], tracking: TrackingConfig) -> list[str]:
    """Model, backend and offload strategy, then the user's own, each once."""
    named = (container["model"]["source"], backend_label(container), container["offload"]["strategy"])
    return list(dict.fromkeys([*(name[:MAX_TAG] for name in named), *tracking.tags]))


def _log_history(run: Any, folder: Path) -> None:
    """Log a row per generation step; memory.csv stands in for the history of a run that was never scored."""
    # the last step's value would stand among the results of the run
    run.define_metric("steps/*", summary="none")
    path = next((path for name in ("history.csv", "memory.csv") if (path := folder / name).exists()), None)
    for row in _read_csv(path) if path else []:
        step = int(row.pop("step"))
        run.log({f"steps/{name}": value for name, value in row.items() if value is not None}, step=step)


def _log_media(wandb: Any, run: Any, folder: Path) -> None:
    paths = {f"images/{name}": folder / "images" / f"{name}.png" for name in IMAGES}
    paths["images/sensitivity"] = folder / "sensitivity.png"
    media: dict[str, Any] = {
        name: wandb.Image(str(path), caption=name.rpartition("/")[2]) for name, path in paths.items() if path.exists()
    }
    for name in TABLES:
        path = folder / f"{name}.csv"
        if path.exists() and (rows := list(_read_csv(path))):
            media[name] = wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    if media:
        run.log(media)


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Yield rows with numbers where a whole column is numbers, and None for an empty cell.

    JSON holds no infinity (the PSNR of identical images): it is None, and a column `<name> is infinite` says so.
    """
    rows = read_csv(path) or []
    numeric = {name for name in (rows[0] if rows else ()) if all(_is_number(row[name]) for row in rows)}
    infinite = [name for name in numeric if any(math.isinf(float(row[name] or 0)) for row in rows)]
    for row in rows:
        cells = {name: (float(text) if name in numeric else text) if text else None for name, text in row.items()}
        marks = {f"{name} is infinite": math.isinf(float(cells[name] or 0)) for name in infinite}
        yield {name: None if marks.get(f"{name} is infinite") else cell for name, cell in cells.items()} | marks


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def _run_summary(folder: Path) -> dict[str, Any]:
    """Return metrics of a run that is done, with their intervals; of any other only how it ended."""
    status = read_json(folder / "status.json") or {}
    ended = {name: status.get(name) for name in ("status", "reason", "message", "seconds")}
    result = read_json(folder / "result.json") if ended["status"] == "done" else None
    if not result:
        return ended
    intervals = metric_intervals(read_samples(folder), result["metrics"])
    ends = {f"{name}_{end}": value for name, pair in intervals.items() for end, value in zip(ENDS, pair, strict=True)}
    return ended | result["metrics"] | ends


def remove_older(folder: Path, keep: Path) -> None:
    """Earlier offline logs of this folder: the new one has all they had."""
    for path in (folder / "wandb").glob("offline-run-*"):
        if path != keep:
            shutil.rmtree(path)
