"""Users' reports, ranks as threads."""

import pytest
from reports import REPORTS

from ringfold import run_local


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("report", REPORTS)
def test_report(report: str, size: int) -> None:
    run_local(size, REPORTS[report])
