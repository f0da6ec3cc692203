"""What prepares a group's operations: on host memory, or on that of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .device import on_device
from .operations import Operations

if TYPE_CHECKING:
    from .device_ways import DeviceWays


class Sides:
    """Both of them; the second one is found when the first array in device memory comes."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._device_operations: DeviceWays | None = None

    @property
    def host_operations(self) -> Operations:
        """Return what prepares operations on host memory; for the package's own use."""
        return self._operations

    def use_devices(self, operations: DeviceWays) -> None:
        """Let these prepare operations on device memory, before the first of them."""
        self._device_operations = operations

    def _side(self, x: Any) -> Operations | DeviceWays:
        """Return what prepares operations on memory such as x's."""
        if not on_device(x):
            return self._operations
        if self._device_operations is None:
            self.use_devices(self._find_devices())
        assert self._device_operations is not None
        return self._device_operations

    def _find_devices(self) -> DeviceWays:
        """Return what is to prepare operations on device memory, before the first of them."""
        raise NotImplementedError
