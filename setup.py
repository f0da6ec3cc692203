"""Map the root folders comm, kernels and parallel under the package ringfold."""

from setuptools import find_packages, setup

NAME = "ringfold"
ROOTS = ("comm", "kernels", "parallel")

setup(
    packages=[
        NAME,
        *(f"{NAME}.{sub}" for sub in find_packages(f"src/{NAME}")),
        *(f"{NAME}.{root}" for root in ROOTS),
        *(f"{NAME}.{root}.{sub}" for root in ROOTS for sub in find_packages(root)),
    ],
    package_dir={NAME: f"src/{NAME}", **{f"{NAME}.{root}": root for root in ROOTS}},
    package_data={NAME: ["py.typed"]},
)
