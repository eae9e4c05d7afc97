"""The joint refinement: poses and map in turns, for production."""

from jaxrefine.refinement import config as config
from jaxrefine.refinement import half_sets as half_sets
from jaxrefine.refinement import insertion as insertion
from jaxrefine.refinement import loop as loop
from jaxrefine.refinement import map_step as map_step
from jaxrefine.refinement import memory as memory
from jaxrefine.refinement import pose_step as pose_step
from jaxrefine.refinement import reconstruction as reconstruction
from jaxrefine.refinement import result as result
from jaxrefine.refinement import schedule as schedule
from jaxrefine.refinement import sets as sets
from jaxrefine.refinement import state as state
from jaxrefine.refinement.loop import init as init
from jaxrefine.refinement.loop import refine as refine
from jaxrefine.refinement.reconstruction import reconstruct as reconstruct
