"""From a recipe to a running Trainer: the command line of Lightning, the run folder, the decision to resume."""
