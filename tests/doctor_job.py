"""`ringfold doctor` where every rank has the pretended GPU: python doctor_job.py FOLDER."""

import sys

import fake_cupy

fake_cupy.install(sys.argv[1])

from ringfold.cli import main  # noqa: E402

sys.exit(main(["doctor"]))
