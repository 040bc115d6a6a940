"""What files say of models, where that is much: rotary positions, and configs and GGUF metadata of the Llama kind."""
