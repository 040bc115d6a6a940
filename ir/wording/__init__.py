"""Text for users about ops and values: signatures, names in other libraries, and Python protocols of tensors."""
