"""Audio files -> batches of waveforms."""
