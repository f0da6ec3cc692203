"""train.py on tensors that say they lie on a GPU (`fake_cuda`), with the same options."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import find_anywhere, pretend

from ringfold.workloads import devices

patch = pytest.MonkeyPatch()
find_anywhere(patch)
patch.setattr(devices, "gpus_for", lambda options: 0 if options.device == "cpu" else 1)
patch.setattr(torch.cuda, "set_device", lambda device: None)
with pretend():
    train = Path(__file__).parent.parent / "train.py"
    sys.argv[0] = str(train)
    runpy.run_path(str(train), run_name="__main__")
