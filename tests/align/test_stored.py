"""The stored reference against the live one: same numbers in any batch, the same training without a second model."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from kullback.align._hf import AlignTrainer, collate_completions, frozen_reference
from kullback.align.f_dpo import FDPOLoss, paper_divergence
from kullback.align.implicit import FSFT, matching_divergence
from kullback.align.methods import Preference
from kullback.align.stored import StoredReference, store_reference
from kullback.core.errors import ConfigError, DataError, ShapeError
from kullback.core.rng import generator as stream
from kullback.models.small import small_llama

PROMPTS = [[1], [2, 3], [4, 5, 6], [7, 1]]
CHOSEN = [[8, 9], [8, 8, 9], [9], [8, 9, 9, 8]]
REJECTED = [[10], [11, 10], [11, 11, 10], [10, 11]]


def model(seed=0):
    return small_llama(12, hidden=16, layers=1, heads=2, length=16, generator=stream(seed))


def batch(rows, completions=CHOSEN):
    return collate_completions([PROMPTS[i] for i in rows], [completions[i] for i in rows], 0)


def given(rows, completions=CHOSEN):
    found = batch(rows, completions)
    return found["input_ids"], found["attention_mask"], found["completion_mask"]


def stored(folder, rows=range(4), reference=None):
    shown = [batch(list(rows)), batch(list(rows), REJECTED)]
    return store_reference(reference or frozen_reference(model()), shown, folder)


def test_rows_come_back_in_any_batch_and_padding(tmp_path):
    live, kept = frozen_reference(model()), StoredReference(stored(tmp_path / "kept"))
    assert len(kept) == 8
    for rows in ([0], [2, 0], [3, 1, 1], [0, 1, 2, 3]):
        for completions in (CHOSEN, REJECTED):
            torch.testing.assert_close(kept(*given(rows, completions)), live(*given(rows, completions)))
    ids, attention, mask = given([1])
    wider = [torch.nn.functional.pad(tensor, (3, 2)) for tensor in (ids, attention)]
    found = kept(*wider, torch.nn.functional.pad(mask, (0, 2)))
    torch.testing.assert_close(found[:, :3], live(ids, attention, mask))
    assert not found[:, 3:].any()
    other = frozen_reference(model(1))(*given([1]))  # the check tells models apart
    assert (found[:, :3] - other).abs().max() > 1e-3


def test_shards_are_read_together_and_what_is_stored_twice_is_kept_once(tmp_path):
    first, second = stored(tmp_path / "0", [0, 1, 1, 0]), stored(tmp_path / "1", [1, 2, 3])
    kept = StoredReference(first, str(second))
    assert (len(StoredReference(first)), len(kept)) == (4, 10)
    torch.testing.assert_close(kept(*given([3, 0])), frozen_reference(model())(*given([3, 0])))
    with pytest.raises(DataError, match="1 of 2 completions are not among the 4"):
        StoredReference(first)(*given([3, 0]))


def test_another_prompt_end_or_mask_is_another_row(tmp_path):
    kept = StoredReference(stored(tmp_path / "kept"))
    ids, attention, mask = given([1])
    changed = ids.clone()
    changed[0, 0] = 5
    fewer = mask.clone()
    fewer[0, -1] = False
    moved = torch.cat([mask.new_zeros(1, 1), mask[:, 1:]], 1)  # its first token given to the prompt
    for others in ((changed, attention, mask), (ids, attention, fewer), (ids, attention, moved)):
        with pytest.raises(DataError, match="not among"):
            kept(*others)


@pytest.mark.parametrize("method", ["f-sft", "f-dpo"])
def test_training_is_the_same_without_a_second_model(tmp_path, method):
    made = {
        "f-sft": FSFT(divergence=matching_divergence("js"), beta=0.5),
        "f-dpo": Preference(options=FDPOLoss(divergence=paper_divergence("forward_kl"), beta=0.5)),
    }[method]
    sides = (CHOSEN,) if method == "f-sft" else (CHOSEN, REJECTED)
    data = [{"row": i} for i in range(4)] * 2

    def collate(items):
        rows = [item["row"] for item in items]
        prompts = [PROMPTS[i] for _ in sides for i in rows]
        return collate_completions(prompts, [side[i] for side in sides for i in rows], 0)

    losses = []
    for reference in (frozen_reference(model()), StoredReference(stored(tmp_path / "kept"))):
        arguments = TrainingArguments(
            str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=3, learning_rate=1e-2, report_to=[],
            save_strategy="no", logging_steps=1, use_cpu=True, remove_unused_columns=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = AlignTrainer(
            model=model(), args=arguments, train_dataset=data, data_collator=collate, method=made, reference=reference
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_the_temperature_is_told(tmp_path):
    warm = StoredReference(stored(tmp_path / "warm", reference=frozen_reference(model(), temperature=2.0)))
    assert warm.temperature == 2.0
    with pytest.raises(DataError, match="temperatures"):
        StoredReference(tmp_path / "warm", stored(tmp_path / "cold"))
    with pytest.raises(ConfigError, match="temperature 2.0"):
        AlignTrainer(
            model=model(), method=Preference(), reference=warm, args=TrainingArguments(str(tmp_path / "out"))
        )


def test_what_is_refused(tmp_path):
    with pytest.raises(DataError, match="none was named"):
        StoredReference()
    with pytest.raises(DataError, match="holds no reference"):
        StoredReference(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no completion was given"):
        store_reference(frozen_reference(model()), [], tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    with pytest.raises(DataError, match="not all finite"):
        stored(tmp_path / "infinite", reference=lambda ids, attention, mask: torch.full(mask.shape, -math.inf))
    with pytest.raises(ShapeError, match="the reference gave"):
        stored(tmp_path / "shape", reference=lambda ids, attention, mask: torch.zeros(2, 2))
    folder = stored(tmp_path / "kept")
    with pytest.raises(ShapeError, match="completion_mask"):
        StoredReference(folder)(torch.zeros(2, 3).long(), torch.ones(2, 3), torch.ones(1, 2))
    np.save(folder / "lengths.npy", np.array([1]))
    with pytest.raises(DataError, match="damaged"):
        StoredReference(folder)
    (folder / "stored.json").write_text(json.dumps({"version": 0, "rows": 8, "temperature": None}))
    with pytest.raises(DataError, match="another version"):
        StoredReference(folder)
