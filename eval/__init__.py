"""Evaluation: closed-loop rollouts, statistics, suites and reports."""
