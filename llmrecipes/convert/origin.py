"""Where a model folder says what it was made of. Torch-free: `llmrecipes report` follows it."""

ORIGIN = "made_from.json"
