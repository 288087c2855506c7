"""Property tests draw the same examples in every run, and none is failed for being slow."""

import tests.core.conftest  # noqa: F401
