"""Adapters: the canonical weights, and LoRA layers inside a model."""

from __future__ import annotations

from .base import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey

__all__ = ["AdapterFile", "AdapterInfo", "AdapterWeights", "LowRankPair", "ModuleKey"]
