"""What every plug-in can test in a few lines."""

import pytest
from my_gates import LoudnessGate

from se_inject.testing import check_block


@pytest.mark.parametrize("options", [{"sharpness": 2.0}, {"rank": 1}])
def test_it_keeps_the_contract(options):
    check_block(LoudnessGate, **options)
