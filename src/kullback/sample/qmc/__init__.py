"""Randomized low-discrepancy points, integration with them under control of the error, and fast kernel methods."""

from kullback.sample.qmc.general_nets import DigitalNet, Faure, Halton
from kullback.sample.qmc.generating_vectors import construct_vector, korobov_vector
from kullback.sample.qmc.lattices import Lattice, baker
from kullback.sample.qmc.nets import DigitalNetB2, Sobol
from kullback.sample.qmc.point_set import PointSet

__all__ = [
    "DigitalNet",
    "DigitalNetB2",
    "Faure",
    "Halton",
    "Lattice",
    "PointSet",
    "Sobol",
    "baker",
    "construct_vector",
    "korobov_vector",
]
