"""The geometric mixture of two models: its law by enumeration, with caches, padding and ends of different lengths."""

import pytest
import torch

from kullback.core.errors import ConfigError
from kullback.core.rng import generator
from kullback.decode.ancestral import draw_tokens
from kullback.decode.mixture import GeometricMixture
from kullback.models.small import small_llama


def models():
    made = [small_llama(5, hidden=16, layers=1, heads=2, length=8, generator=generator(0, name)) for name in "ab"]
    with torch.no_grad():
        for model in made:
            model.lm_head.weight.mul_(30)
    return [model.eval() for model in made]


def law(model, prompt):
    with torch.no_grad():
        return model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tokens_and_their_log_probabilities_are_those_of_the_mixture(share):
    first, second = models()
    prompts, mask = torch.tensor([[1, 2, 3], [0, 0, 4]]), torch.tensor([[True] * 3, [False, False, True]])
    drawn = draw_tokens(
        GeometricMixture(first, second, share=share), prompts, mask=mask, count=4, generator=generator(1), group=40,
        end=[0],
    )  # fmt: skip
    lengths = drawn.mask.sum(1)
    assert len(set(lengths.tolist())) > 1, "some ended earlier than others"
    for row in (0, 7, 41, 79):
        prompt = ([1, 2, 3] if row < 40 else [4])
        for place in range(int(lengths[row])):
            mixed = ((1 - share) * law(first, prompt) + share * law(second, prompt)).log_softmax(-1)
            token = int(drawn.tokens[row, place])
            assert drawn.log_probs[row, place].item() == pytest.approx(mixed[token].item(), abs=1e-4)
            if 0.0 < share < 1.0:  # listed wrong: the mixture of the probabilities themselves
                plain = ((1 - share) * law(first, prompt).exp() + share * law(second, prompt).exp()).log()
                assert drawn.log_probs[row, place].item() != pytest.approx(plain[token].item(), abs=1e-4)
            prompt = [*prompt, token]


def test_shares_and_modes():
    first, second = models()
    with pytest.raises(ConfigError, match="exponent"):
        GeometricMixture(first, second, share=1.5)
    mixture = GeometricMixture(first.train(), second, share=0.5)
    draw_tokens(mixture, torch.tensor([[1]]), count=1, generator=generator(0))
    assert first.training
    assert not second.training
