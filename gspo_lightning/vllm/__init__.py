"""Rollouts by an engine in another process: decides when it samples, and with which weights."""

from gspo_lightning.vllm.ahead import ApartSampler, AsyncSampler, check_apart, is_ahead
