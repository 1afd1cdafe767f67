"""torch-fidelity, with a stand-in for torchvision: it imports that for networks and data which are not used here."""

import sys
import types
from typing import Any


class _Empty(types.ModuleType):
    """A module in which every name is a class without anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _stand_in() -> dict[str, types.ModuleType]:
    names = ("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.transforms", "torchvision.transforms.functional")
    modules: dict[str, types.ModuleType] = {name: _Empty(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    return modules


def import_torch_fidelity() -> Any:
    """The package with all that is compared with."""
    before = {name: sys.modules.get(name) for name in _stand_in()}
    if before["torchvision"] is None:
        sys.modules.update(_stand_in())
    import torch_fidelity
    import torch_fidelity.feature_extractor_inceptionv3
    import torch_fidelity.interpolate_compat_tensorflow
    import torch_fidelity.metric_fid
    import torch_fidelity.metric_isc
    import torch_fidelity.metric_kid
    import torch_fidelity.metric_prc

    for name, module in before.items():
        if module is None:
            sys.modules.pop(name, None)
    return torch_fidelity
