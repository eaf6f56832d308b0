"""The main job on an embedded default: a small network, real digits, no download."""

from normconv.demo.digits import DigitsResNet as DigitsResNet
from normconv.demo.run import Row as Row
from normconv.demo.run import Stages as Stages
from normconv.demo.run import run as run
