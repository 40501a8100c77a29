"""Budgets: what the words mean, and what is refused."""

from __future__ import annotations

import pytest

import veneer as vn
from helpers import refuses
from veneer.select.budget import Budget, parse


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ({"params": "0.1%"}, ("parameters", 1000)),
        ({"params": "50k"}, ("parameters", 50_000)),
        ({"params": "1.2M"}, ("parameters", 1_200_000)),
        ({"params": 77}, ("parameters", 77)),
        ({"latency": "+0%"}, ("latency", 1.0)),
        ({"latency": "+12.5%"}, ("latency", 1.125)),
        ({"memory": "12GB"}, ("memory", 12 * 10**9)),
        ({"memory": "1.5GiB"}, ("memory", 3 * 2**29)),
        ({"minutes": 0.5}, ("minutes", 0.5)),
        ({"trials": 40}, ("trials", 40)),
    ],
)
def test_words_and_numbers(words, number):
    found = parse(words, 1_000_000)
    assert found.limits() == {number[0]: number[1]} and found.words == words


def test_only_zero_latency_means_what_merges():
    assert parse({"latency": "+0%"}, 10).merged_only and not parse({"latency": "+1%"}, 10).merged_only and not Budget().merged_only


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"parms": "1%"}, "Did you mean 'params'"),
        ({"params": "many"}, "is no number of parameters"),
        ({"params": True}, "is no number of parameters"),
        ({"params": "0.00000001%"}, "less than one parameter"),
        ({"latency": "0%"}, r"Write how much more than the base's"),
        ({"latency": "-5%"}, "is no latency"),
        ({"latency": 0}, "is no latency"),
        ({"memory": 12}, "a number and a unit"),
        ({"memory": "0GB"}, "is no amount of memory"),
        ({"minutes": 0}, "above 0"),
        ({"minutes": "long"}, "is no number of minutes"),
        ({"trials": 2.5}, "a whole number"),
        ("0.1%", "a budget is a mapping"),
    ],
)
def test_refusals(words, says):
    with refuses(vn.ConfigError, says):
        parse(words, 1_000_000)
