"""Small bases and small data, made once."""

from __future__ import annotations

import pytest

from bases import make_bases, make_data


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """(folder of bases, {kind of data: path})."""
    return make_bases(tmp_path_factory.mktemp("bases")), make_data(tmp_path_factory.mktemp("data"))
