"""A small folder of labelled sounds becomes a good classifier. Read the folders in the order of the data's way:
data, model, training, inference."""

__version__ = "0.1.0"
