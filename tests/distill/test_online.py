"""Online distillation: pairs by size, joint and alternating updates, frozen teachers, and the Trainer of networks."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from kullback.core.errors import ConfigError, DataError
from kullback.core.rng import generator as stream
from kullback.distill import bdkd_loss, bdkd_teacher_loss
from kullback.distill.online import OnlineDistiller, OnlineLoss, by_size
from kullback.models.small import small_llama

LOSS = OnlineLoss(temperature=3.0, delta=2.5, alpha=0.8, teacher_alpha=0.3)


def network(hidden, source):
    model = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 4)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.7, generator=source)
    return model


def sgd(networks, rate=0.1):
    return [torch.optim.SGD(net.parameters(), lr=rate) for net in networks]


@pytest.fixture
def batch(generator):
    inputs = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 4, (12,), generator=generator)


def flat(net):
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def gradient(net):
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def test_two_networks_have_the_losses_of_the_pair(generator, batch):
    large, small = network(16, generator), network(3, generator)
    logits = [large(batch[0]), small(batch[0])]
    teacher, student = LOSS(logits, batch[1])
    wanted = bdkd_teacher_loss(*logits, batch[1], temperature=3.0, alpha=0.3)["loss"]
    assert teacher["loss"].item() == pytest.approx(wanted.item(), abs=1e-13)
    wanted = bdkd_loss(*logits, batch[1], temperature=3.0, delta=2.5, alpha=0.8)
    assert student["loss"].item() == pytest.approx(wanted["loss"].item(), abs=1e-13)
    assert student["reverse_share"].item() == wanted["reverse_share"].item()
    assert "reverse_share" not in teacher


def test_three_networks_average_over_their_pairs(generator, batch):
    logits = [network(width, generator)(batch[0]) for width in (16, 6, 3)]
    middle = LOSS(logits, batch[1])[1]
    hard = nn.functional.cross_entropy(logits[1], batch[1])
    below = bdkd_loss(logits[0], logits[1], temperature=3.0, delta=2.5)["loss"]
    above = bdkd_teacher_loss(logits[1], logits[2], temperature=3.0)["loss"]
    assert middle["loss"].item() == pytest.approx((hard + (0.8 * below + 0.3 * above) / 2).item(), abs=1e-12)
    assert middle["cross_entropy"].item() == pytest.approx(hard.item(), abs=1e-12)


@pytest.mark.parametrize("mode", ["bdkd", "dml", "jeffreys"])
def test_one_backward_pass_gives_every_network_its_own_gradient(generator, batch, mode):
    """What autograd gives from the sum is what each loss alone gives to its own network."""
    networks = [network(width, generator) for width in (16, 6, 3)]
    loss = replace(LOSS, mode=mode)
    sum(term["loss"] for term in loss([net(batch[0]) for net in networks], batch[1])).backward()
    together = [gradient(net) for net in networks]
    for place, net in enumerate(networks):
        for other in networks:
            other.zero_grad()
        loss([net(batch[0]) for net in networks], batch[1])[place]["loss"].backward()
        assert torch.allclose(gradient(net), together[place], atol=1e-13)
        assert all(p.grad is None for other in networks if other is not net for p in other.parameters())


def test_joint_steps_are_simultaneous_and_teacher_first_ones_are_not(generator, batch):
    start = [network(3, generator), network(16, generator)]  # the smaller one comes first
    assert by_size(start) == [1, 0]
    nets = copy.deepcopy(start)
    terms = OnlineDistiller(nets, sgd(nets), loss=LOSS).step(*batch)
    by_hand = copy.deepcopy(start)
    teacher, student = LOSS([by_hand[1](batch[0]), by_hand[0](batch[0])], batch[1])
    (teacher["loss"] + student["loss"]).backward()
    for net in by_hand:
        nn.utils.vector_to_parameters(flat(net) - 0.1 * gradient(net), net.parameters())
    for one, other in zip(nets, by_hand):
        assert torch.allclose(flat(one), flat(other), atol=1e-14)
    assert terms[0] == {name: value.item() for name, value in student.items()}
    assert "reverse_share" not in terms[1]

    in_turn = copy.deepcopy(start)
    OnlineDistiller(in_turn, sgd(in_turn), loss=LOSS, update="teacher_first").step(*batch)
    assert torch.allclose(flat(in_turn[1]), flat(nets[1]), atol=1e-14)  # the teacher saw the same student
    assert not torch.allclose(flat(in_turn[0]), flat(nets[0]), atol=1e-6)
    late = copy.deepcopy(start)
    student = LOSS([in_turn[1](batch[0]), late[0](batch[0])], batch[1])[1]
    student["loss"].backward()
    assert torch.allclose(flat(in_turn[0]), flat(late[0]) - 0.1 * gradient(late[0]), atol=1e-14)


@pytest.mark.parametrize("update", ["joint", "teacher_first"])
def test_a_frozen_teacher_is_offline_distillation(generator, batch, update):
    large, small = nn.Sequential(network(16, generator), nn.Dropout(0.5)), network(3, generator)
    before, mine = flat(large), copy.deepcopy(small)
    OnlineDistiller([large, small], [None, *sgd([small])], loss=LOSS, update=update).step(*batch)
    assert torch.equal(flat(large), before)
    assert not large.training
    assert all(parameter.grad is None for parameter in large.parameters())
    student = bdkd_loss(large(batch[0]), mine(batch[0]), batch[1], temperature=3.0, delta=2.5, alpha=0.8)
    student["loss"].backward()
    assert torch.allclose(flat(small), flat(mine) - 0.1 * gradient(mine), atol=1e-14)


def test_inputs_may_be_keywords_and_masked_rows_do_not_count(generator, batch):
    class Named(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return {"logits": self.net(x)}

    pair = [Named(network(8, generator)), Named(network(3, generator))]
    mask = torch.arange(12) < 7
    sliced = copy.deepcopy(pair)
    options = {"loss": LOSS, "logits": lambda output: output["logits"]}
    found = OnlineDistiller(pair, sgd(pair), **options).step({"x": batch[0]}, batch[1], mask=mask)
    wanted = OnlineDistiller(sliced, sgd(sliced), **options).step({"x": batch[0][:7]}, batch[1][:7])
    assert found[1] == pytest.approx(wanted[1], abs=1e-13)
    assert torch.allclose(flat(pair[1]), flat(sliced[1]), atol=1e-13)


def test_a_student_learns_from_its_peer_what_its_labels_do_not_say(generator, batch):
    """With one label for all, only the teacher's logits can tell the inputs apart."""
    inputs, labels = torch.randn(200, 6, generator=generator, dtype=torch.float64), torch.zeros(200).long()
    large, start = network(32, generator), network(8, generator)
    apart = {}
    for alpha in (0.0, 10.0):
        small = copy.deepcopy(start)
        optimizers = [None, torch.optim.Adam(small.parameters(), lr=0.02)]
        distiller = OnlineDistiller([large, small], optimizers, loss=replace(LOSS, alpha=alpha))
        for _ in range(150):
            apart[alpha] = distiller.step(inputs, labels)[1]["distillation"]
    assert apart[10.0] < 0.2 * apart[0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: OnlineDistiller([a], sgd([a])), "two networks"),
        (lambda a, b: OnlineDistiller([a, b], sgd([a])), "1 optimizers"),
        (lambda a, b: OnlineDistiller([a, b], [None, None]), "frozen"),
        (lambda a, b: OnlineDistiller([a, b], sgd([a, b]), update="student_first"), "update is"),
        (lambda a, b: OnlineLoss(delta=0.9), "at least 1"),
        (lambda a, b: OnlineLoss(temperature=0.0), "temperature"),
        (lambda a, b: OnlineLoss(alpha=-1.0), "alpha"),
        (lambda a, b: OnlineLoss()([torch.zeros(1, 2)], torch.tensor([0])), "two networks"),
    ],
)
def test_errors_say_what_to_do(generator, call, message):
    with pytest.raises(ConfigError, match=message):
        call(network(4, generator), network(3, generator))


# --- inside the Trainer


def language_models():
    sizes = {"large": (16, 2), "small": (8, 1)}
    return {
        name: small_llama(32, hidden=hidden, layers=layers, heads=2, length=12, generator=stream(0, name))
        for name, (hidden, layers) in sizes.items()
    }


def trainer_of(folder, *, steps=2, batch=4, accumulate=1, **options):
    from transformers import TrainingArguments

    from kullback.distill._hf_online import OnlineDistillationTrainer, OnlineNetworks

    source = stream(0, "tokens")
    rows = [torch.randint(0, 32, (12,), generator=source) for _ in range(8)]
    data = []
    for place, row in enumerate(rows):
        labels = row.clone()
        labels[: 1 + place] = -100  # a different number in every row
        data.append({"input_ids": row, "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch, learning_rate=1e-2, seed=0,
        gradient_accumulation_steps=accumulate, use_cpu=True, report_to="none", disable_tqdm=True, save_steps=2,
        lr_scheduler_type="constant", dataloader_pin_memory=False, logging_steps=1, remove_unused_columns=False,
        optim="adamw_torch", max_grad_norm=0.0,
    )  # fmt: skip
    model = OnlineNetworks(language_models(), LOSS, causal=True)
    return OnlineDistillationTrainer(model=model, args=arguments, train_dataset=data, **options)


def test_the_module_returns_the_sum_of_what_the_networks_lose(tmp_path):
    trainer = trainer_of(tmp_path)
    rows = [trainer.train_dataset[i] for i in range(3)]
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    outputs = trainer.model(labels=labels, input_ids=ids)
    logits = [net(input_ids=ids).logits[:, :-1] for net in language_models().values()]
    wanted = LOSS(logits, labels[:, 1:])
    assert outputs["loss_large"].item() == pytest.approx(wanted[0]["loss"].item(), rel=1e-6)
    assert outputs["loss_small"].item() == pytest.approx(wanted[1]["loss"].item(), rel=1e-6)
    assert outputs["loss"].item() == pytest.approx(sum(w["loss"].item() for w in wanted), rel=1e-6)
    assert outputs["logits"].shape == (3, 12, 32)


def test_the_trainer_trains_both_at_their_own_rates_and_resumes(tmp_path):
    trainer = trainer_of(tmp_path / "a", steps=4, learning_rates={"large": 1e-3})
    trainer.train()
    groups = trainer.optimizer.param_groups
    numbers = {1e-2: 0, 1e-3: 0}
    for group in groups:
        numbers[group["initial_lr"]] += sum(parameter.numel() for parameter in group["params"])
    sizes = {name: sum(p.numel() for p in net.parameters()) for name, net in trainer.model.networks.items()}
    assert numbers == {1e-3: sizes["large"], 1e-2: sizes["small"]}
    fresh = language_models()
    for name, net in trainer.model.networks.items():
        assert not torch.equal(flat(net), flat(fresh[name]))
    resumed = trainer_of(tmp_path / "a", steps=4, learning_rates={"large": 1e-3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, net in trainer.model.networks.items():
        assert torch.equal(flat(net), flat(resumed.model.networks[name])), name


def test_the_trainer_evaluates_the_smallest_network(tmp_path):
    seen = {}
    trainer = trainer_of(tmp_path, compute_metrics=lambda found: seen.update(logits=found.predictions) or {"rows": 1.0})
    data = [trainer.train_dataset[i] for i in range(4)]
    metrics = trainer.evaluate(data)
    ids, labels = (torch.stack([row[name] for row in data]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        wanted = trainer.model(labels=labels, input_ids=ids)
    assert metrics["eval_loss"] == pytest.approx(wanted["loss"].item(), rel=1e-5)
    assert metrics["eval_rows"] == 1.0
    assert torch.allclose(torch.from_numpy(seen["logits"]), wanted["logits"], atol=1e-6)


def test_accumulation_does_not_change_the_step(tmp_path):
    whole, parts = (trainer_of(tmp_path / str(n), steps=1, batch=8 // n, accumulate=n) for n in (1, 4))
    whole.train()
    parts.train()
    for one, other in zip(whole.model.networks.values(), parts.model.networks.values()):
        assert torch.allclose(flat(one), flat(other), atol=2e-4)
    assert whole.state.log_history[0]["loss"] == pytest.approx(parts.state.log_history[0]["loss"], rel=1e-4)


def test_every_network_is_written_and_read_and_tied_weights_are_no_trouble(tmp_path):
    from transformers import AutoModelForCausalLM

    from kullback.distill._hf_online import OnlineNetworks

    trainer = trainer_of(tmp_path)
    trainer.model.save_pretrained(tmp_path / "models")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / "small")
    assert torch.equal(flat(again), flat(trainer.model.networks["small"]))
    tied = language_models()
    tied["small"].lm_head.weight = tied["small"].model.embed_tokens.weight
    trainer.model = OnlineNetworks(tied, LOSS, causal=True)
    trainer.save_model(str(tmp_path / "tied"))
    assert (tmp_path / "tied" / "model.safetensors").exists()


def test_the_trainer_says_what_is_missing(tmp_path):
    from kullback.distill._hf_online import OnlineDistillationTrainer, OnlineNetworks

    with pytest.raises(ConfigError, match="no network 'teacher'"):
        trainer_of(tmp_path, learning_rates={"teacher": 1.0})
    trainer = trainer_of(tmp_path)
    with pytest.raises(DataError, match="labels"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.zeros(1, 2, dtype=torch.long)})
    with pytest.raises(ConfigError, match="wrap"):
        OnlineDistillationTrainer(model=language_models()["small"], args=trainer.args)
    with pytest.raises(ConfigError, match="two networks"):
        OnlineNetworks({"one": nn.Linear(2, 2)}, LOSS)
