"""Typed settings: `load` reads every layer into one frozen `Settings`, or says at once all that is wrong."""

from wmtp_worker.settings.load import load
from wmtp_worker.settings.schema import (
    CheckpointSettings,
    CloudSettings,
    DataSettings,
    EarlyStoppingSettings,
    EvaluationSettings,
    HostSettings,
    LoggingSettings,
    ModelSettings,
    RunSettings,
    Settings,
    TrainingSettings,
    WeightingSettings,
)

__all__ = [
    "CheckpointSettings",
    "CloudSettings",
    "DataSettings",
    "EarlyStoppingSettings",
    "EvaluationSettings",
    "HostSettings",
    "LoggingSettings",
    "ModelSettings",
    "RunSettings",
    "Settings",
    "TrainingSettings",
    "WeightingSettings",
    "load",
]
