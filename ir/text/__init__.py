"""The graph as text: printed, scanned and parsed."""
