"""Weights that checkpoint folders of Hugging Face store quantized: GPTQ, AWQ, compressed-tensors and other formats."""
