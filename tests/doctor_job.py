"""`ringfold doctor` where every rank has the pretended GPU: python doctor_job.py FOLDER."""

import sys

import fake_cupy

fake_cupy.install(sys.argv[1])

from ringfold import doctor  # noqa: E402
from ringfold.cli import main  # noqa: E402

doctor.NBYTES = 1 << 18  # the pretended GPU is slow
sys.exit(main(["doctor"]))
