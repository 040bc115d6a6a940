"""Tokenizers built from files other than tokenizer.json: older files, SentencePiece's, a GGUF file's metadata."""
