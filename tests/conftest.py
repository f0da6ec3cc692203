"""Settings that all rungs of tests share."""

import pytest
from hypothesis import settings

# A shared two-core machine pauses at any moment, so the time of one example says nothing.
settings.register_profile("ringfold", deadline=None, print_blob=True)
settings.load_profile("ringfold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU, with the reason, where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    missing = no_gpu_because() if marked else None
    if missing:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"no GPU: {missing}"))


def no_gpu_because() -> str | None:
    """Say why no test can use a GPU here, or None if one can."""
    try:
        import cupy
    except ImportError:
        return "cupy is not installed"
    try:
        found = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return str(error)
    return None if found else "cupy finds no device"
