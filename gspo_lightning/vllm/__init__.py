"""Rollouts by an engine in another process: decides when it samples, and with which weights."""

from gspo_lightning.vllm.ahead import ApartSampler as ApartSampler
from gspo_lightning.vllm.ahead import AsyncSampler as AsyncSampler
