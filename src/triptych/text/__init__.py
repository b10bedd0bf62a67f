"""Text in and out: tokenizer, chat rendering, incremental decoding, stop strings. Sees only words and errors."""
