"""Adapters: the canonical weights, and their layers inside a model."""

from __future__ import annotations

from .base import AdapterFile, AdapterInfo, AdapterWeights, LowRankPair, ModuleKey, Update

__all__ = ["AdapterFile", "AdapterInfo", "AdapterWeights", "LowRankPair", "ModuleKey", "Update"]
