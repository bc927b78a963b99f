"""An adapter in memory and in a model: canonical weights, kinds, layers, strengths."""
