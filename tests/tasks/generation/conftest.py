"""Networks and data that several tests of this room share."""

import pytest

from eanet import registry
from eanet.tasks.generation.builtin import Digits
from eanet.tasks.generation.task import GenerationTask


@pytest.fixture(scope="session")
def digits():
    return Digits().splits


@pytest.fixture
def build(digits):
    """Return a function that builds a task on the digits."""

    def make(name="eagan_tiny", *, arguments=None, **options):
        model = registry.create_model(name, num_classes=10, in_channels=1, **(arguments or {}))
        return GenerationTask(model, digits.facts, **options)

    return make
