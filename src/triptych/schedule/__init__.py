"""Which rows of which requests run in the next step. No tensors: a step plan is a value."""

from triptych.schedule.scheduler import Scheduler
from triptych.schedule.stats import ScheduleStats

__all__ = ["ScheduleStats", "Scheduler"]
