"""What GraphParameters takes, and the sentence for what it does not."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest

from srcgcnn_fast import GraphParameters, InputError

WRONG = {
    "radius": ["8", None, True, 0, -1.0, math.nan, math.inf, 8j, [8.0], np.array([8.0, 9.0])],
    "max_neighbors": [1.5, 12.0, "12", None, True, 0, -3, math.nan, 2**31, [12]],
    "symmetry_tolerance": ["x", True, False, 0, 0.1, -1e-5, math.nan, math.inf, [1e-5]],
    "padded": ["yes", None, 1, 0.0, math.nan],
    "isolated": ["drop", None, True, 1, math.nan, ["keep"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_one_sentence_that_names_it(name, value):
    with pytest.raises(InputError) as caught:
        GraphParameters(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ") and repr(value) in message and "\n" not in message


def test_numbers_of_numpy_become_plain_ones():
    given = GraphParameters(np.float32(6.5), np.int64(9), np.float64(1e-4))
    assert given == GraphParameters(6.5, 9, 1e-4) and hash(given) == hash(GraphParameters(6.5, 9, 1e-4))
    assert GraphParameters(**json.loads(json.dumps(asdict(given)))) == given
    whole = GraphParameters(radius=8)
    assert whole == GraphParameters() and type(whole.radius) is float


@pytest.mark.parametrize("radius", [0.1, 1, 2.5, 3.3, 4.8, 5, 5.2, 6, 6.5, 7.4, 8, 8.1, 10, 12, 15.6])
@pytest.mark.parametrize(("dmin", "step"), [(0.0, 0.2), (0.5, 0.2), (0.0, 0.1), (1.0, 0.3)])
def test_gaussians_are_those_of_the_published_programs(radius, dmin, step):
    assert GraphParameters(radius).n_gaussians(dmin, step) == len(np.arange(dmin, radius + step, step))
    assert GraphParameters().n_gaussians() == 41


def test_no_tolerance_is_the_full_graph():
    assert GraphParameters(symmetry_tolerance=None).symmetry_tolerance is None
