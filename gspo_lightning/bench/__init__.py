"""How long the parts take and how much memory, against other ways of doing the same.

``python -m gspo_lightning.bench --help`` lists the measurements.
"""
