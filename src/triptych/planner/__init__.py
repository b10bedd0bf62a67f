"""Does it fit, how fast can it be, what does it cost: pure arithmetic on shapes and data sheets."""

from triptych.planner.hardware import Catalogue, Device, Node, catalogue
from triptych.planner.models import PlannedModel, model_named
from triptych.planner.plan import Plan, Wanted, plan

__all__ = ["Catalogue", "Device", "Node", "Plan", "PlannedModel", "Wanted", "catalogue", "model_named", "plan"]
