"""Finetune N tasks with Lightning, merge them into one multitask model with Decom-Renorm-Merge, and test it.

The public names are those of ``__init__.pyi``. Each is imported when it is first used: a merge of files must not wait
for Lightning.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("lightning_drm")
