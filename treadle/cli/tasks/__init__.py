"""Commands that ask a model for something that people ask: labels, answers, translations. A file a command."""
