"""What a frozen model's features say, learned from a few labels."""

from panterra.evaluate.probes.fit import STRENGTHS, fit_probe
from panterra.evaluate.probes.probe import (
    NEIGHBOURS,
    TEMPERATURE,
    FeatureSource,
    Kind,
    Probe,
    ProbeClass,
    Task,
    knn_scores,
    load_probe,
)
from panterra.evaluate.probes.report import ClassReport, Report

__all__ = [
    "NEIGHBOURS",
    "STRENGTHS",
    "TEMPERATURE",
    "ClassReport",
    "FeatureSource",
    "Kind",
    "Probe",
    "ProbeClass",
    "Report",
    "Task",
    "fit_probe",
    "knn_scores",
    "load_probe",
]
