"""llmrecipes: from raw Japanese and English text to an evaluated chat model, by recipe."""

__version__ = "0.2.0"
