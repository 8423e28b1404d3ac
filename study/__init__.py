"""What is done with many runs: sweeps, comparisons, the report, and all of it in one command."""

import common  # noqa: F401 (first: Ctrl-C during the imports is one line)
