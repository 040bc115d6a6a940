"""Conversations with chat models, and rendering of untrusted chat templates within limits."""
