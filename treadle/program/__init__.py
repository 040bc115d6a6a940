"""The path from MODEL and its options to a program."""
