"""Text from a trained model, and how well it predicts texts. Nothing here is imported before it is asked for."""
