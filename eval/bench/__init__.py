"""Benchmarks: what this machine does, beside what people use today. One shape of result for all of them."""

from .run import BENCHES, bench, write

__all__ = ["BENCHES", "bench", "write"]
