"""Self-Flow: self-supervised flow matching. The names below are loaded when they are first used."""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Config": "training.config",
    "DataConfig": "data.options",
    "Model": "training.export",
    "ModelConfig": "method.options",
    "ObjectiveConfig": "method.options",
    "Output": "method.backbone",
    "Run": "training.run",
    "TrainConfig": "training.config",
    "load": "training.export",
    "model": "training.models",
    "register_backbone": "registries",
    "register_dataset": "registries",
    "register_explorer": "registries",
    "register_metric": "registries",
    "register_objective": "registries",
    "register_sampler": "registries",
    "train": "training.loop",
    "use": "registries",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
