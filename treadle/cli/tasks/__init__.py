"""Commands that apply a model to a task: labels, answers, translations. Each command has its own file."""
