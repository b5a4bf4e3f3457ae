"""One file for each stage: its recipe (a dataclass) and a function that runs it. See docs/data.md."""
