"""Randomized low-discrepancy points, integration with them under control of the error, and fast kernel methods.

Point sets: Lattice, DigitalNetB2 (Sobol), Halton, Faure, DigitalNet, and Independent beside them. Kernels that become
diagonal on them: KernelSI, KernelDSI, ...; FastGram and FastGP. `integrate` to a tolerance, under a measure.
`engine.Engine` is scipy's interface.
"""

from kullback.sample.qmc.copulas import ClaytonCopula, FrankCopula, GaussianCopula, StudentCopula
from kullback.sample.qmc.cubature import Control, CubatureResult, integrate
from kullback.sample.qmc.general_nets import DigitalNet, Faure, Halton
from kullback.sample.qmc.generating_vectors import construct_vector, korobov_vector
from kullback.sample.qmc.gram import FastGP, FastGram
from kullback.sample.qmc.independent import Independent
from kullback.sample.qmc.kernels import (
    KernelCombined,
    KernelDSI,
    KernelDSIAdaptive,
    KernelMultiTask,
    KernelSI,
    ProductKernel,
    RadialKernel,
)
from kullback.sample.qmc.lattices import Lattice, baker
from kullback.sample.qmc.measures import (
    BrownianMotion,
    Gaussian,
    JohnsonSU,
    Kumaraswamy,
    Lebesgue,
    Marginals,
    Measure,
    StudentT,
    Uniform,
    expectation,
    normal_quantile,
)
from kullback.sample.qmc.nets import DigitalNetB2, Sobol
from kullback.sample.qmc.periodic import periodized
from kullback.sample.qmc.point_set import PointSet
from kullback.sample.qmc.transforms import bit_reversed, fftbr, fwht, ifftbr, omega_fftbr, omega_fwht

__all__ = [
    "BrownianMotion",
    "ClaytonCopula",
    "Control",
    "CubatureResult",
    "DigitalNet",
    "DigitalNetB2",
    "FastGP",
    "FastGram",
    "Faure",
    "FrankCopula",
    "Gaussian",
    "GaussianCopula",
    "Halton",
    "Independent",
    "JohnsonSU",
    "KernelCombined",
    "KernelDSI",
    "KernelDSIAdaptive",
    "KernelMultiTask",
    "KernelSI",
    "Kumaraswamy",
    "Lattice",
    "Lebesgue",
    "Marginals",
    "Measure",
    "PointSet",
    "ProductKernel",
    "RadialKernel",
    "Sobol",
    "StudentCopula",
    "StudentT",
    "Uniform",
    "baker",
    "bit_reversed",
    "construct_vector",
    "expectation",
    "fftbr",
    "fwht",
    "ifftbr",
    "integrate",
    "korobov_vector",
    "normal_quantile",
    "omega_fftbr",
    "omega_fwht",
    "periodized",
]
