"""Limits of W&B's names of runs, groups and projects, and the environment variables that set them."""

from __future__ import annotations

import hashlib

MAX_TAG = 64  # characters
MAX_NAME = 128  # characters of a project, a group, a run's name or its job type
NOT_IN_PROJECTS = "/\\#?%:"
# Settings that say which run this is, and how it goes on. Left in a shell by another program, or set by a scheduler for
# its own run, they would give this one another id, group or history. WANDB_ENTITY, WANDB_BASE_URL and keys stay.
OF_A_RUN = (
    "WANDB_RUN_ID", "WANDB_NAME", "WANDB_RUN_NAME", "WANDB_NOTES", "WANDB_RUN_NOTES", "WANDB_TAGS", "WANDB_RUN_TAGS",
    "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_JOB_TYPE", "WANDB_RUN_JOB_TYPE", "WANDB_SWEEP_ID",
    "WANDB_SWEEP_PARAM_PATH", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM", "WANDB_RESUMED", "WANDB_REINIT",
    "WANDB_MODE", "WANDB_DISABLED", "WANDB_DIR", "WANDB_ANONYMOUS", "WANDB_ALLOW_VAL_CHANGE",
)  # fmt: skip


def cut(name: str) -> str:
    """Cut a name to MAX_NAME characters; a cut name ends with a digest, which keeps names distinct."""
    if len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME - 9]}…{digest}"


def problem_of_project(name: str) -> str | None:
    """Return why W&B would reject a project's name, or None."""
    found = [character for character in NOT_IN_PROJECTS if character in name]
    if found:
        return f"must be without {' '.join(NOT_IN_PROJECTS)}"
    if not name or len(name) > MAX_NAME:
        return f"must have 1 to {MAX_NAME} characters, not {len(name)}"
    return None
