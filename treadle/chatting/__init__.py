"""Conversations: chat templates, which strangers wrote, rendered within limits, and a model that replies."""
