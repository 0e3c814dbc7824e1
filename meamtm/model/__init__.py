"""Waveforms -> logits."""
