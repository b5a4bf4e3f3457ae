"""The shape of a recipe: its sections, the class behind each, and the type of the value at any path."""

from __future__ import annotations

from typing import Any

from llmrecipes.recipe.signatures import Parameter, Signature, Sources
from llmrecipes.recipe.types import (
    Anything,
    Arguments,
    DictOf,
    Instance,
    Length,
    OneOf,
    Root,
    Scalar,
    Type,
    Union,
    type_of,
)

# Sections whose keys are the arguments of one class.
SECTION_CLASSES = {
    "trainer": "lightning.pytorch.Trainer",
    "checkpoint": "llmrecipes.checkpoint.callback.Checkpoints",
    "logging": "llmrecipes.callbacks.Logging",
    "samples": "llmrecipes.callbacks.Samples",
    "stop": "llmrecipes.callbacks.GracefulStop",
    "stability": "llmrecipes.callbacks.StabilityGuard",
}
# Sections that choose their class: class_path and init_args.
CHOSEN_SECTIONS = ("model", "data")
PLAIN_SECTIONS: dict[str, Type] = {
    "name": Scalar("str"),
    "seed": Scalar("int"),
    "run_root": Scalar("str"),
    "resume": OneOf(("auto", "never", "required")),
    "cool_down": Length(),
    "resume_lr": OneOf(("keep", "override", "restart", "cool_down")),
}
REQUIRED = ("model", "data", "trainer")
SECTIONS = (*PLAIN_SECTIONS, *CHOSEN_SECTIONS, *SECTION_CLASSES)
_RESUMES = "fit resumes from where it saves, run_root/name: write resume: auto, never or required"
# Keys of other tools, and what stands for them here.
ADVICE = {
    **dict.fromkeys(
        ("ckpt_path", "load", "save", "load_dir", "save_dir", "resume_from", "resume_from_checkpoint"),
        _RESUMES,
    ),
    **dict.fromkeys(
        ("init_from", "from_pretrained", "pretrained", "model_name_or_path"),
        "weights to begin with are model.init_args.init_from: a folder of convert from-hf, or another run",
    ),
    "seed_everything": "write seed",
    "optimizer": "write it under model.init_args",
    "lr_scheduler": "write it under model.init_args, as schedule",
    "callbacks": "write it under trainer",
}
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")


def section_type(name: str, sources: Sources) -> Type:
    """The type of a top-level section."""
    if name in PLAIN_SECTIONS:
        return PLAIN_SECTIONS[name]
    if name in CHOSEN_SECTIONS:
        return Instance(None)
    symbol = sources.find(SECTION_CLASSES[name]) if name in SECTION_CLASSES else None
    signature = sources.signature(symbol) if symbol else None
    return Arguments(signature) if signature else Anything()


def class_signature(class_path: object, sources: Sources) -> Signature | None:
    """The signature of a class named in a recipe; None when it cannot be known."""
    symbol = sources.find(class_path) if isinstance(class_path, str) else None
    return sources.signature(symbol) if symbol else None


def parameter_type(parameter: Parameter, sources: Sources) -> Type:
    """The type of an argument."""
    return type_of(parameter.annotation, parameter.module, sources)


def type_below(holder: Any, key: str, kind: Type, sources: Sources) -> Type:
    """The type of ``holder[key]``, where ``holder`` itself has type ``kind``; `Anything` where it cannot be known."""
    if isinstance(kind, Root):
        return section_type(key, sources)
    if key == "init_args" and isinstance(holder, dict) and "class_path" in holder:
        signature = class_signature(holder["class_path"], sources)
        return Arguments(signature) if signature else Anything()
    if isinstance(kind, Arguments):
        parameter = kind.signature.parameters.get(key)
        return parameter_type(parameter, sources) if parameter else Anything()
    for option in kind.options if isinstance(kind, Union) else (kind,):
        if isinstance(option, Instance) and option.is_dataclass and option.symbol:
            signature = sources.signature(option.symbol)
            parameter = signature.parameters.get(key) if signature else None
            return parameter_type(parameter, sources) if parameter else Anything()
    return Anything()


def free_mapping(kind: Type, value: dict[str, Any]) -> bool:
    """Whether a mapping of this type has free keys, so that a later one replaces an earlier one."""
    options = kind.options if isinstance(kind, Union) else (kind,)
    structured = any(isinstance(option, Instance) for option in options) or "class_path" in value
    return any(isinstance(option, DictOf) for option in options) and not structured
