"""Trackers: where else a run's log goes, through TrainingArguments' `report_to`."""

from __future__ import annotations

from ..errors import ConfigError, did_you_mean


def trackers(names: list[str]) -> list[str] | str:
    """What TrainingArguments takes as `report_to` for the trackers `names` (tensorboard, wandb, mlflow, trackio, …).

    Raises: ConfigError for one that transformers does not know, or whose package is missing; before a run has begun.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"there is no tracker {name!r}", where="report_to", fix=did_you_mean(name, INTEGRATION_TO_CALLBACK))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as e:
            raise ConfigError(f"{name} is not ready: {str(e).splitlines()[0]}", where="report_to", fix=f"pip install {name.replace('_', '-')}") from None
    return names or "none"
