"""Random networks: programs as data, the strategy that draws them, and what must hold for each."""

from tests.random_networks.checks import Checked as Checked
from tests.random_networks.checks import check as check
from tests.random_networks.checks import check_drawn as check_drawn
from tests.random_networks.program import Layer as Layer
from tests.random_networks.program import Op as Op
from tests.random_networks.program import Program as Program
from tests.random_networks.program import RandomNet as RandomNet
from tests.random_networks.steps import programs as programs
