"""Hypothesis' profiles: `tests`, which is the same in every run, and `fuzz` for `make fuzz`, with random seeds and more examples."""

from hypothesis import HealthCheck, settings

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "tests", max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
# the database in .hypothesis/ has what failed: the next run begins with it
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True, suppress_health_check=_SLOW_IS_FINE)
settings.load_profile("tests")
