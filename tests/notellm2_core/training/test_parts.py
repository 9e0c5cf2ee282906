"""Trainings of some parts: what is frozen stays as it was to the last bit, adapters end up in plain weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from notellm2_core.config import PARTS, Config
from notellm2_core.model.build import build_model, load_model
from notellm2_core.model.parts import parts_of, set_trained
from notellm2_core.model.vision import VisionEncoder
from notellm2_core.training import loop
from notellm2_core.training.data import load_training_data
from notellm2_core.training.losses import MAX_TAU
from notellm2_core.training.save import plain_weights, save_model
from tests.notellm2_core.training.world import FOLDERS, World, one_rank, tiny_config, train
