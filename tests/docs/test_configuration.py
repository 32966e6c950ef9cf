"""docs/configuration.md is up to date."""

from tests.deploy.files import ROOT
from tests.docs.reference import reference


def test_the_reference_is_generated_from_the_options_classes() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run make docs"
