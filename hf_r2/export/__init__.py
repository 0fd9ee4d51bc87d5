"""Packed models in other runtimes' formats."""
