"""Tokens through a transformer, fast: attention, packed rows, the head, decoding, products.

Its two faces stand in front: ``gspo_lightning.logprobs`` and ``gspo_lightning.sampling``.
"""
