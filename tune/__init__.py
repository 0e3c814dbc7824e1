"""The study: `python -m tune configs/tune/esc10.yaml` finds the configuration that suits a small data set."""
