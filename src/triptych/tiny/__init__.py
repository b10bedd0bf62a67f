"""The bundled checkpoint: how it is made and trained, and where it lies.

from triptych.tiny import TINY_SHAPE, ensure_checkpoint
ensure_checkpoint()          # a directory with config.json, tokenizer.json and safetensors
"""

from triptych.tiny.bundle import PACKAGED, ensure_checkpoint, is_trained
from triptych.tiny.shape import TINY_SHAPE, TOKENIZER_FILE

__all__ = ["PACKAGED", "TINY_SHAPE", "TOKENIZER_FILE", "ensure_checkpoint", "is_trained"]
