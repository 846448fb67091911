"""Puts ``configs/`` into a wheel, where ``--config quickstart.yaml`` finds it. A checkout needs no copy."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Configs(BuildHookInterface):
    """Called when a wheel is built."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the folder.

        Args:
            version: ``standard`` or ``editable``.
            build_data: What the wheel is made of.
        """
        if version == "standard":
            build_data["force_include"]["configs"] = "lightning_drm/configs"
