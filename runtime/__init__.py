"""Runtime: what drives compiled graphs (sessions, generation, training loops, distributed launch)."""
