"""The paper's Algorithms 1 and 3, and presets of their constants."""

from jaxrefine.paper import algorithm1 as algorithm1
from jaxrefine.paper import algorithm3 as algorithm3
from jaxrefine.paper import presets as presets
from jaxrefine.paper import steps as steps
from jaxrefine.paper.algorithm1 import Algorithm1Config as Algorithm1Config
from jaxrefine.paper.algorithm1 import Algorithm1Info as Algorithm1Info
from jaxrefine.paper.algorithm1 import Algorithm1State as Algorithm1State
from jaxrefine.paper.algorithm1 import Problem as Problem
from jaxrefine.paper.algorithm1 import Schedule as Schedule
from jaxrefine.paper.algorithm1 import StepRule as StepRule
from jaxrefine.paper.algorithm1 import init as init
from jaxrefine.paper.algorithm1 import reconstruct as reconstruct
from jaxrefine.paper.algorithm1 import refine as refine
from jaxrefine.paper.algorithm1 import step as step
from jaxrefine.paper.algorithm1 import update_poses as update_poses
from jaxrefine.paper.algorithm1 import update_volume as update_volume
from jaxrefine.paper.algorithm3 import EulerPoses as EulerPoses
from jaxrefine.paper.presets import match_contrast as match_contrast
from jaxrefine.paper.presets import paper_preset as paper_preset
from jaxrefine.paper.presets import printed_preset as printed_preset
from jaxrefine.paper.presets import released_preset as released_preset
from jaxrefine.paper.steps import GivenSteps as GivenSteps
from jaxrefine.paper.steps import NewtonSteps as NewtonSteps
