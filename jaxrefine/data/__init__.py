"""Particle images, their preprocessing, and the spectra that maps are compared with."""

from jaxrefine.data import observation as observation
from jaxrefine.data import particles as particles
from jaxrefine.data import preprocess as preprocess
from jaxrefine.data import visit as visit
