"""Rules across fields: what each value alone cannot show. Pure functions over the plain recipe.

Each rule passes over values that are missing or of a wrong type; those are reported where types are checked.
"""

from llmrecipes.recipe.rules.batch import batch_problems
from llmrecipes.recipe.rules.facts import Facts, Finding
from llmrecipes.recipe.rules.initial import initial_problems
from llmrecipes.recipe.rules.model import model_problems
from llmrecipes.recipe.rules.schedule import schedule_problems
from llmrecipes.recipe.rules.shards import shard_problems
from llmrecipes.recipe.rules.stability import stability_problems
from llmrecipes.recipe.rules.stages import stage_problems
from llmrecipes.recipe.rules.strategy import strategy_problems
from llmrecipes.recipe.rules.trainer import trainer_problems

# Rules that look at the recipe only, and those that also look at files.
RULES = (
    trainer_problems,
    batch_problems,
    schedule_problems,
    model_problems,
    strategy_problems,
    stability_problems,
    stage_problems,
)
FILE_RULES = (shard_problems, initial_problems)

__all__ = ["FILE_RULES", "RULES", "Facts", "Finding"]
