"""The command line with FSDP on processors: accelerate shards over accelerators only, so it is told that these are some.

KULLBACK_TEST_STOP=n sends SIGTERM to the process when step n begins.
"""

import os
import signal
import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

import kullback.jobs._distillation as job
from kullback import cli


def _processors(self):
    self.device = torch.device("cpu")


torch.distributed.init_process_group("gloo")
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = _processors
evaluate = job.Distillation.evaluate


def _evaluate(self, trainer):
    assert {type(weight).__name__ for weight in trainer.model_wrapped.parameters()} == {"DTensor"}
    if os.environ.get("KULLBACK_TEST_STOP") == str(trainer.state.global_step):
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(self, trainer)


job.Distillation.evaluate = _evaluate
sys.exit(cli.execute())
