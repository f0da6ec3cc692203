"""A program on tensors that say they lie on a GPU (`fake_cuda`): PROGRAM [OPTION ...]."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import find_anywhere, pretend

from ringfold.workloads import devices

patch = pytest.MonkeyPatch()
find_anywhere(patch)
patch.setattr(devices, "count_gpus", lambda: 1)
patch.setattr(devices, "gpus_for", lambda options: 0 if options.device == "cpu" else 1)
patch.setattr(torch.cuda, "set_device", lambda device: None)
patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
patch.setattr(torch.cuda, "get_device_name", lambda device=None: "a pretended GPU")

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
with pretend():
    runpy.run_path(sys.argv[0], run_name="__main__")
