"""The command line with FSDP on processors, which accelerate only shards over accelerators: it is told they are some.

KULLBACK_TEST_STOP=n sends SIGTERM to the process when step n ends.
"""

import os
import signal
import sys


def main() -> int:
    """Run the command line of this process."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    import kullback.jobs._distillation as job
    from kullback import cli

    def on_processor(self):
        self.device = torch.device("cpu")

    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = on_processor
    evaluate = job.Distillation.evaluate

    def sharded_and_perhaps_stopped(self, trainer):
        kinds = {type(weight).__name__ for weight in trainer.model_wrapped.parameters()}
        if kinds != {"DTensor"}:
            raise RuntimeError(f"the weights are not sharded: {kinds}")
        if os.environ.get("KULLBACK_TEST_STOP") == str(trainer.state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, trainer)

    job.Distillation.evaluate = sharded_and_perhaps_stopped
    return cli.execute()


if __name__ == "__main__":
    sys.exit(main())
