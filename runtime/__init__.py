"""Execution of compiled graphs: sessions, generation, training loops, distributed launch."""
