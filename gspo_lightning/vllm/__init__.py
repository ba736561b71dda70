"""Rollouts by an engine apart from the policy: what it is asked, and that it has its weights."""

from gspo_lightning.vllm.engine import Completion, Engine, EngineError, Limits
