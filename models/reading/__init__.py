"""Readers of rotary positions, and of configs and GGUF metadata of the Llama family."""
