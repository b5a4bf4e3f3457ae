"""Plain ``nn.Module`` decoders: no loss, no optimizer, no parallelism."""

from llmrecipes.models.cache import KVCache
from llmrecipes.models.decoder import Block, Decoder, DecoderOutput
from llmrecipes.models.generation import Continuation, generate, generate_batch
from llmrecipes.models.init import init_weights
from llmrecipes.models.moe import Routing
from llmrecipes.models.sampling import Sampling
from llmrecipes.recipe.lora_config import LoraConfig, LoraExperts
from llmrecipes.recipe.model_config import ModelConfig
from llmrecipes.recipe.moe_config import MoEConfig
from llmrecipes.recipe.rope_config import RopeScaling

__all__ = [
    "Block",
    "Continuation",
    "Decoder",
    "DecoderOutput",
    "KVCache",
    "LoraConfig",
    "LoraExperts",
    "MoEConfig",
    "ModelConfig",
    "RopeScaling",
    "Routing",
    "Sampling",
    "generate",
    "generate_batch",
    "init_weights",
]
