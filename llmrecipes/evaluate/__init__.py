"""What a model has learned: tasks, scores with their uncertainty, and the report."""
