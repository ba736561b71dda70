"""Algorithms side by side on one task: many runs, one table.

``python -m gspo_lightning.compare PLAN`` makes the runs and writes the report.
"""
