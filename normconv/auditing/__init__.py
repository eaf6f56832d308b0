"""Which layers let one sample of a batch see another: measured by changing one sample, and by name."""

from normconv.auditing.whole_model import MODES as MODES
from normconv.auditing.whole_model import audit as audit
