"""What recipes/ternarize.py runs: ternary weights from a model and arguments to a written, packed folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPProcessor, PreTrainedModel
from transformers.utils import logging

from clipmap_hf.data.loader import PairDataset, PairStream
from clipmap_hf.distributed import join_processes
from clipmap_hf.evaluation.cost import CostReport, model_cost
from clipmap_hf.hub.card import render_card
from clipmap_hf.hub.folder import write_student_folder
from clipmap_hf.runs import cached_teachers
from clipmap_hf.teachers import Teacher
from clipmap_hf.ternary.arguments import TernaryArguments
from clipmap_hf.ternary.config import TernaryConfig
from clipmap_hf.ternary.stage import TernaryStage
from clipmap_hf.training.arguments import DataArguments, RunArguments, TeacherCacheArguments
from clipmap_hf.training.optimization import step_count
from clipmap_hf.training.setup import config_values, evaluation_function, run_stage, training_pairs
from clipmap_hf.training.trainer import TrainResult


__all__ = ["run_ternarization"]

logger = logging.get_logger(__name__)
