"""Evaluation: closed-loop rollouts, statistics, suites and reports."""

from .report import rates_table, write_report
from .runner import EXPERT, evaluate
from .suite import Suite, load_suite

__all__ = ["EXPERT", "Suite", "evaluate", "load_suite", "rates_table", "write_report"]
