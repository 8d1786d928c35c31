"""Imported once by the fork server of the trainer tests: importing Megatron costs 20 s and more."""

import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402, F401
from transformers import AutoModelForCausalLM  # noqa: E402, F401

from refit.train_side import cpu_compat, policy  # noqa: E402, F401

torch.set_num_threads(1)
cpu_compat.import_bridge()
