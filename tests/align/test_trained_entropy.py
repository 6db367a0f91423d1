"""The policy's entropy in the Trainer's log: that of whole logits, at logged steps alone, and no bit else of a run."""

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from kullback.align import _hf
from kullback.align._hf import AlignTrainer, collate_completions, index_items
from kullback.align.grpo import Grpo
from kullback.align.kdrl import Kdrl
from kullback.align.log_probs import completion_log_probs
from kullback.align.methods import Preference
from kullback.align.ppo import Ppo
from kullback.align.scored import ScoredRollouts
from kullback.core.errors import ConfigError
from kullback.core.rng import generator as stream
from kullback.models.heads import has_plain_head
from kullback.models.small import small_llama

PAIRS = [([1], [2, 3, 4], [5]), ([6, 7], [8], [9, 10]), ([3], [3, 3], [1, 2, 3]), ([2, 9, 4], [5, 5], [7])]
SIZES = {"hidden": 16, "layers": 1, "heads": 2, "length": 16}


def collate(items):
    chosen, rejected = ([pair[side] for pair in items] for side in (1, 2))
    return collate_completions([pair[0] for pair in items] * 2, chosen + rejected, 0)


def model():
    return small_llama(12, **SIZES, generator=stream(0))


class Before(TrainerCallback):
    """Copies of the policy before each step."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


def trained(folder, *, data=PAIRS, method=None, policy=None, callback=None, entropy=True, steps=6, **options):
    more = {key: options.pop(key) for key in list(options) if key.startswith("logging")}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-2,
        report_to=[], save_strategy="no", use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        average_tokens_across_devices=True, **{"logging_steps": 3, **more},
    )  # fmt: skip
    first = model()
    if method is None:
        options |= {"reference": _hf.frozen_reference(first), "data_collator": collate}
    trainer = AlignTrainer(
        model=policy or model(), args=arguments, train_dataset=data, method=method or Preference(), entropy=entropy,
        callbacks=[callback] if callback else None, **options,
    )  # fmt: skip
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def by_hand(state, temperature=1.0, vocabulary=None):
    """The mean over all tokens of all completions, one text at a time."""
    policy, found = model().eval(), []
    policy.load_state_dict(state)
    with torch.no_grad():
        for prompt, *completions in PAIRS:
            for completion in completions:
                logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1, :vocabulary]
                log_p = (logits / temperature).log_softmax(-1)
                found.extend((-(log_p.exp() * log_p).sum(-1)).tolist())
    assert len(found) == sum(len(part) for pair in PAIRS for part in pair[1:])
    return sum(found) / len(found)


def test_it_is_that_of_whole_logits_before_the_logged_step(tmp_path):
    before = Before()
    _, logs = trained(tmp_path, callback=before)
    wanted = [by_hand(state) for state in before.states]
    assert [entry["metric/entropy"] for entry in logs] == pytest.approx([wanted[2], wanted[5]], rel=1e-5)
    assert abs(wanted[2] - wanted[1]) > 1e-3, "the step before has another"


def test_at_the_temperature_of_the_loss_and_of_the_tokens_that_exist(tmp_path):
    before, options = Before(), {"temperature": 0.5, "vocabulary": 11}
    _, logs = trained(tmp_path, callback=before, allow_temperature_mismatch=True, steps=3, **options)
    wanted = by_hand(before.states[2], **options)
    assert logs[0]["metric/entropy"] == pytest.approx(wanted, rel=1e-5)
    for other in ({"temperature": 0.5}, {"vocabulary": 11}):
        assert abs(wanted - by_hand(before.states[2], **other)) > 1e-3


def test_the_run_has_the_bits_of_one_without_and_measures_at_logged_steps_alone(tmp_path, monkeypatch):
    asked = []

    def told(*given, **options):
        asked.append(options["entropy"])
        return completion_log_probs(*given, **options)

    plain, logs = trained(tmp_path / "plain", entropy=False)
    assert all("metric/entropy" not in entry for entry in logs)
    monkeypatch.setattr(_hf, "completion_log_probs", told)
    measured, others = trained(tmp_path / "measured", logging_first_step=True)
    assert asked == ["measured"] * 2 + [False] * 2 + ["measured"] * 2 + [False] * 4 + ["measured"] * 2
    assert len(others) == 3
    assert all(torch.equal(x, y) for x, y in zip(plain.model.parameters(), measured.model.parameters(), strict=True))
    asked.clear()
    trained(tmp_path / "epochs", steps=2, logging_strategy="epoch")
    assert asked == ["measured"] * 4


def test_a_head_that_is_not_plain(tmp_path):
    policy = model()
    policy.lm_head.__class__ = type("Head", (torch.nn.Linear,), {})
    assert not has_plain_head(policy)
    before = Before()
    _, logs = trained(tmp_path, policy=policy, callback=before, steps=3)
    assert logs[0]["metric/entropy"] == pytest.approx(by_hand(before.states[2]), rel=1e-5)


@pytest.mark.parametrize("method", [Grpo(), Ppo(beta=0.0)])
def test_of_the_policys_own_completions(method, tmp_path):
    prompts = [[1], [2, 3], [4, 5, 6], [7]]
    source = ScoredRollouts(
        prompts=prompts, texts=[str(prompt) for prompt in prompts], length=3, decode=str,
        reward=lambda prompts, completions: [float("3" in text) for text in completions],
    )  # fmt: skip
    _, logs = trained(tmp_path, data=index_items(range(4)), method=method, rollouts=source, group=4, steps=3)
    assert 0.0 < logs[0]["metric/entropy"] < torch.tensor(12.0).log().item()


def test_what_is_refused(tmp_path):
    ids, mask = torch.ones(1, 3, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ConfigError, match='entropy is True, False or "measured"'):
        completion_log_probs(model(), ids, torch.ones_like(ids), mask, entropy="yes")
    method = Kdrl(divergence="exact")
    reference = _hf.frozen_reference(model())
    with pytest.raises(ConfigError, match="no entropy of them is measured"):
        trained(tmp_path, method=method, data=index_items(range(4)), reference=reference, rollouts=None)
