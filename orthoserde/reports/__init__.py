"""What a save, a load, a verification, a diagnosis or a change of a live model found or did, told to the caller."""

from orthoserde.reports.changed import BakeReport, CanonicalizeReport, ChartReport
from orthoserde.reports.findings import Code, Finding, Severity
from orthoserde.reports.loaded import RESTORED, Fidelity, LoadReport, TensorReport
from orthoserde.reports.saved import SaveReport
from orthoserde.reports.verified import VerifyReport

__all__ = [
    "RESTORED",
    "BakeReport",
    "CanonicalizeReport",
    "ChartReport",
    "Code",
    "Fidelity",
    "Finding",
    "LoadReport",
    "SaveReport",
    "Severity",
    "TensorReport",
    "VerifyReport",
]
