"""``python -m membench.doctor``: run all checks."""

import sys

from membench.doctor.checks import report
from membench.host import console

if __name__ == "__main__":
    sys.exit(console.main(lambda: report(full=True)))
