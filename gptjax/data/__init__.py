"""Data: from text to token files to batches."""

from gptjax.data.prepare import Dataset, load_dataset

__all__ = ["Dataset", "load_dataset"]
