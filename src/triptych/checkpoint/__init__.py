"""Checkpoints of DeepSeek-V4: read in any dialect and format, looked into, and written."""

from triptych.checkpoint.fingerprint import fingerprint
from triptych.checkpoint.inspect import CheckpointReport, inspect_checkpoint
from triptych.checkpoint.reader import CheckpointReader, RawTensor
from triptych.checkpoint.sizes import stored_bytes
from triptych.checkpoint.stream import official_tensors, safetensors_stream
from triptych.checkpoint.synthetic import random_tensors
from triptych.checkpoint.table import TensorSpec, tensor_table
from triptych.checkpoint.writer import synthesize, write_checkpoint

__all__ = [
    "CheckpointReader",
    "CheckpointReport",
    "RawTensor",
    "TensorSpec",
    "fingerprint",
    "inspect_checkpoint",
    "official_tensors",
    "random_tensors",
    "safetensors_stream",
    "stored_bytes",
    "synthesize",
    "tensor_table",
    "write_checkpoint",
]
