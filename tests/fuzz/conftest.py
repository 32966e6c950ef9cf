"""Hypothesis' profiles: `tests` is the same in every run; `fuzz`, for `make fuzz`, has random seeds and more examples."""

import os

from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "tests", max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
# the database in .hypothesis/ has what failed: the next run begins with it
settings.register_profile("fuzz", max_examples=400, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))
