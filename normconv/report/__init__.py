"""Rows, checks and reports, as data and on a terminal. Loads no torch."""

from normconv.report.drift_plot import plot_drift as plot_drift
from normconv.report.report import Check as Check
from normconv.report.report import Report as Report
from normconv.report.report import SiteRow as SiteRow
from normconv.report.report import jsonable as jsonable
from normconv.report.report import versions as versions
