"""Tokenizers made of what stands where there is no tokenizer.json: older files, SentencePiece's, a GGUF file's own."""
