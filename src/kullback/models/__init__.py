"""Small models, built from a configuration and trained on the spot."""

from kullback.models.adder import trained_adder
from kullback.models.denoisers import FlatDenoiser, TokenDiscriminator, TransformerDenoiser, WindowDenoiser
from kullback.models.ensemble import EnsembleMLP, train_ensemble
from kullback.models.experts import CosineHead, ExpertLinear, Experts, MultiExpert
from kullback.models.masked_diffusion import (
    CosineSchedule,
    LogLinearSchedule,
    mdm_exact_distribution,
    mdm_loss,
    mdm_posterior,
    transition_logprob,
)
from kullback.models.masked_diffusion_sampling import AncestralSampler
from kullback.models.perceptron import perceptron
from kullback.models.small import small_llama, trained_llama

__all__ = [
    "AncestralSampler",
    "CosineHead",
    "CosineSchedule",
    "EnsembleMLP",
    "ExpertLinear",
    "Experts",
    "FlatDenoiser",
    "LogLinearSchedule",
    "MultiExpert",
    "TokenDiscriminator",
    "TransformerDenoiser",
    "WindowDenoiser",
    "mdm_exact_distribution",
    "mdm_loss",
    "mdm_posterior",
    "perceptron",
    "small_llama",
    "train_ensemble",
    "trained_adder",
    "trained_llama",
    "transition_logprob",
]
