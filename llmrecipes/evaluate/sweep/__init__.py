"""Accuracy against the number of examples that a model was fine-tuned on."""
