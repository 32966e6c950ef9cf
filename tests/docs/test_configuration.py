"""The reference of the options is the schema's."""

from tests.deploy.files import ROOT
from tests.docs.reference import reference


def test_the_reference_is_that_of_the_schema() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run make docs"
