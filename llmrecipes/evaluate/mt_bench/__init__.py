"""MT-Bench: conversations of two turns, marked by a judge."""
