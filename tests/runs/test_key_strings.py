"""Settings that the code names by dotted strings are settings of the real parser."""

import pytest

from dist_siglip.health import start_check
from dist_siglip.runs import provenance
from tests.support.parsers import parser_of_command

NAMED = {
    "FREE_KEYS": provenance.FREE_KEYS,
    "IDENTITY_KEYS": frozenset(provenance.IDENTITY_KEYS),
    "start_check._PLACES": start_check._PLACES,
    "start_check._FREE": start_check._FREE,
}


@pytest.fixture(scope="module")
def settings():
    """Every setting of ``fit``, groups included."""
    parser = parser_of_command(("fit",))
    keys = set(parser.get_defaults(skip_validation=True).keys(branches=True))
    return keys | {action.dest for action in parser._actions}


@pytest.mark.parametrize("where", NAMED)
def test_every_key_is_a_setting(where, settings):
    assert NAMED[where] <= settings, sorted(NAMED[where] - settings)


def test_a_key_that_is_none_would_be_found(settings):
    assert not {"data.bad_samples_log"} <= settings
