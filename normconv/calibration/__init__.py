"""What data sets in a converted model: moments of each channel, and how far it is from the original."""

from normconv.calibration.batches import Batches as Batches
from normconv.calibration.data_init import initialise as initialise
from normconv.calibration.data_init import initialise_ as initialise_
from normconv.calibration.distillation import recover as recover
from normconv.calibration.drift import Drift as Drift
from normconv.calibration.drift import Progress as Progress
from normconv.calibration.drift import measure_drift as measure_drift
from normconv.calibration.drift import wilson_interval as wilson_interval
from normconv.calibration.freezing import Frozen as Frozen
from normconv.calibration.freezing import freeze as freeze
from normconv.calibration.freezing import set_alone_ as set_alone_
from normconv.calibration.lessons import Lesson as Lesson
from normconv.calibration.ranks import Share as Share
from normconv.calibration.ranks import join_processes as join_processes
from normconv.calibration.sequential import calibrate as calibrate
from normconv.calibration.together import calibrate_and_recover as calibrate_and_recover
from normconv.calibration.together import check_asked as check_asked
from normconv.calibration.together import check_calibrable as check_calibrable
from normconv.calibration.together import initialise_converted as initialise_converted
