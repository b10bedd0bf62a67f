"""Checkpoints of DeepSeek-V4: read in any dialect and format, looked into, and written."""

from triptych.checkpoint.reader import CheckpointReader, RawTensor
from triptych.checkpoint.synthetic import random_tensors
from triptych.checkpoint.writer import synthesize, write_checkpoint

__all__ = ["CheckpointReader", "RawTensor", "random_tensors", "synthesize", "write_checkpoint"]
