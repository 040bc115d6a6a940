"""Long readers of model files: rotary positions, and configs and GGUF metadata of the Llama family."""
