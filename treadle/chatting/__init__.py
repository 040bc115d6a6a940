"""Conversations: untrusted chat templates, rendered within limits, and a model that replies."""
