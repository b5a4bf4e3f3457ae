"""What a training needs, worked out before it starts: memory, time, cost, and what this machine lacks."""
