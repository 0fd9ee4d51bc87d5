"""Trains a tiny BERT classifier in a process of its own and saves weights and alphas: train_tiny.py OUT [options].

Options as JSON in the second argument; `kill_after_step` sends SIGKILL to this very process at the end of that step,
`unused` gives the model a regularised linear layer that no forward pass uses, and one that those of the first process
alone use (times 0), as with layer drop; `recipe` prepares it with these settings of R2QuantConfig; `words` is the number
of rows of its table.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from hf_r2 import R2QuantConfig, R2Trainer, R2TrainingArguments, prepare
from hf_r2.range_shards import whole


class Kill(TrainerCallback):
    """Ends the process the hard way."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def fsdp_on_cpu():
    """accelerate shards on GPUs alone: let it believe that a CPU under gloo is one of them."""
    start = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def tiny_bert(dropout=0.0, words=50):
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=words, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, max_position_embeddings=16,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def tiny_pairs(size=32):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 50, (size, 6), generator=generator).tolist()
    return Dataset.from_list([{"input_ids": i, "labels": sum(i) % 2} for i in ids])


def main(out: str, options: dict):
    kill, unused, resume = (
        options.pop("kill_after_step", None),
        options.pop("unused", False),
        options.pop("resume", None),
    )
    model = tiny_bert(options.pop("dropout", 0.0), options.pop("words", 50))
    if options.get("fsdp"):
        fsdp_on_cpu()
    if unused:
        model.spare, model.sometimes = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        if os.environ.get("RANK", "0") == "0":
            model.classifier.register_forward_hook(lambda _, x, out: out + 0 * model.sometimes(x[0]).sum())
    recipe = options.pop("recipe", None)
    if recipe is not None:
        prepare(model, R2QuantConfig(**recipe))
    defaults = {
        "output_dir": out, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
        "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4,
    }  # fmt: skip
    args = R2TrainingArguments(**{**defaults, **options})
    trainer = R2Trainer(model=model, args=args, train_dataset=tiny_pairs(), callbacks=[Kill(kill)] if kill else [])
    trainer.train(resume_from_checkpoint=resume)
    state = {k: whole(v).detach().clone().contiguous() for k, v in model.state_dict().items()}
    if options.get("fsdp"):
        assert type(trainer.range_loss.weights()["classifier"]).__name__ == "DTensor"
    logged = {f"log.{k}": torch.tensor(trainer.state.log_history[0][k]) for k in ("loss", "task_loss", "range_loss")}
    alphas = {"alphas": trainer.range_loss.scalars.detach().clone()}
    save_file({**state, **logged, **alphas}, Path(out) / f"result-{args.process_index}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    # gloo's threads may abort a Python that shuts down: see scripts/interrupts.py
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(0)
