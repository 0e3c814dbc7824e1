"""A laptop -> a Ray cluster: one YAML file says what to run there, and how to reach it."""
