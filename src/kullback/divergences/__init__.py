"""Divergences between categorical distributions, from log-probabilities, in nats and never reduced; and transport."""

from kullback.divergences.cauchy_schwarz import cauchy_schwarz, cs_divergence, cs_gaussian, cs_gmm, cs_qmi_gaussian
from kullback.divergences.cauchy_schwarz_samples import (
    conditional_cs,
    cs_divergence_samples,
    cs_qmi,
    cs_qmi_normalized,
    median_bandwidth,
)
from kullback.divergences.estimators import kl_sampled
from kullback.divergences.f import (
    alpha_divergence,
    generalized_jsd,
    jeffreys,
    jsd,
    kl,
    neyman,
    pearson,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    squared_hellinger,
    total_variation,
)
from kullback.divergences.family import FDivergence
from kullback.divergences.generators import F_NAMES, f_divergence
from kullback.divergences.options import NAMES, dual, from_logits, log_mixture, mixture, named
from kullback.divergences.pairwise import pairwise_cost
from kullback.divergences.plackett_luce import listmle_loss, pl_log_prob, pl_sample, pld_loss
from kullback.divergences.renyi import renyi
from kullback.divergences.sinkhorn import sinkhorn_cost, sinkhorn_divergence, sinkhorn_plan

__all__ = [
    "F_NAMES",
    "NAMES",
    "FDivergence",
    "alpha_divergence",
    "cauchy_schwarz",
    "conditional_cs",
    "cs_divergence",
    "cs_divergence_samples",
    "cs_gaussian",
    "cs_gmm",
    "cs_qmi",
    "cs_qmi_gaussian",
    "cs_qmi_normalized",
    "dual",
    "f_divergence",
    "from_logits",
    "generalized_jsd",
    "jeffreys",
    "jsd",
    "kl",
    "kl_sampled",
    "listmle_loss",
    "log_mixture",
    "median_bandwidth",
    "mixture",
    "named",
    "neyman",
    "pairwise_cost",
    "pearson",
    "pl_log_prob",
    "pl_sample",
    "pld_loss",
    "renyi",
    "reverse_kl",
    "sinkhorn_cost",
    "sinkhorn_divergence",
    "sinkhorn_plan",
    "skew_kl",
    "skew_reverse_kl",
    "squared_hellinger",
    "total_variation",
]
