"""The initialisation of the new modules, measured on a few hundred training notes.

The paper has none of it: its batches and step counts can afford a random initialisation, a short run of a small model
cannot (docs/paper_map.md). Each part is a setting of `model.init`.

1. gate bias: below zero, the gate of Eq. 7 starts nearer to the LLM's state.
2. visual-token gain: the visual embeddings E_v start at this multiple of the word embeddings' length. Those of a random
   connector are shorter or longer by chance, and the LLM's first layer weighs them accordingly.
3. PCA projector: raw last-token states are collapsed (mean cosine 0.94 to 0.999). The projector starts as the principal
   directions of the LLM's states, their mean taken out, so that embeddings start spread out.
4. fusion scale: after the projector, the late-fusion branch v has this share of the spread of the LLM's state, so
   neither drowns the other. Before the projector the two cannot be compared: the LLM's spread lies in a few of its
   dimensions, the branch's in all of them.

    python -m notellm2_core.training.initialise ... --out DIR     saves the initial model: the zero-shot row
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import Config
from notellm2_core.model.build import build_model
from notellm2_core.model.encode_images import with_features
from notellm2_core.model.fusion import LateFusion
from notellm2_core.model.mlrm import MLRMModel
from notellm2_core.model.open_inputs import InputReader
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import NoteBatch
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.progress import ProgressBar
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset, model_cache
from notellm2_core.training.launch import TRAIN_DAYS_HELP
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import VisionEncoder

_BATCH_NOTES = 32


def initialise(model: MLRMModel, data: PairDataset, config: Config, encoder: VisionEncoder | None = None) -> None:
    """Initialise the new modules of `model` by the settings `config.model.init`. Deterministic in `config.seed`.

    `encoder`: encodes the images of `data` if that has pixels. Runs on a GPU if there is one; model and encoder stay
    there. Raises ValueError for fewer than 2 training notes to measure on.
    """
    init = config.model.init
    if model.fusion is not None:
        with torch.no_grad():
            model.fusion.gate.bias.fill_(init.gate_bias)
    if init.fusion_scale is None and init.visual_token_gain is None and not init.pca_projector:
        return
    chosen = notes_to_measure(data, config)
    if len(chosen) < 2:
        raise ValueError(f"model.init needs at least 2 training notes to measure on, there are {len(chosen)}")
    was_training = model.training
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nn.Module.to(model, device)
    if encoder is not None:
        encoder.to(device)
    model.eval()

    @torch.no_grad()
    def batch_of(notes: np.ndarray) -> NoteBatch:
        return with_features(data.note_batch(notes).to(device), encoder)

    batches = [chosen[i : i + _BATCH_NOTES] for i in range(0, len(chosen), _BATCH_NOTES)]
    if init.visual_token_gain is not None:
        scale_visual_words(model, map(batch_of, batches), init.visual_token_gain)
    silent = dist.is_initialized() and dist.get_rank() > 0
    progress = ProgressBar(batches, desc="initial states", unit="batch", disable=silent)
    states, branch = _states(model, map(batch_of, progress))
    if init.pca_projector:
        set_pca(model.projector, states)
    if model.fusion is not None and branch is not None:
        with_image = torch.from_numpy(data.has_image(chosen)).to(states.device)
        if init.fusion_scale is not None and with_image.sum() > 1:
            with torch.no_grad():
                llm_spread, branch_spread = (spread(model.projector(x[with_image])) for x in (states, branch))
            branch = scale_branch(model.fusion, branch, init.fusion_scale * llm_spread / branch_spread.clamp(min=1e-12))
        with torch.no_grad():
            states, _ = model.fusion(branch, states)
    if init.pca_projector:
        centre(model.projector, states)
    model.train(was_training)


def notes_to_measure(data: PairDataset, config: Config) -> np.ndarray:
    """The training notes that values of the model are measured on: `model.init.num_pca_notes` of them, at random."""
    return np.random.default_rng([config.seed, 1]).permutation(data.train_notes)[: config.model.init.num_pca_notes]


def spread(states: Tensor) -> Tensor:
    """The root mean square distance of states [n, h] from their mean, per dimension."""
    return states.double().var(dim=0, correction=0).mean().sqrt()


@torch.no_grad()
def set_pca(projector: nn.Linear, states: Tensor) -> None:
    """projector := the principal directions of `states` [n, h], whitened: each output has mean 0 and spread 1.

    Without whitening, the first two or three directions dominate the cosine. Measured on a demo world of 700 notes with
    SmolLM2's first 3 layers, recall@10 of validation pairs: 0.09 plain and 0.18 whitened before the first step, 0.35
    and 0.65 after 8 steps, 0.49 and 0.73 after 16 (one seed). A spread of 1 also keeps the first steps of Adam, which
    move every weight by the learning rate, from bringing the mean of the states back.

    Rows of the projector beyond the rank of `states` keep small random values.
    """
    x = states.double().cpu()
    _, singular, directions = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)  # [k], [k, h]
    rank = int((singular > 1e-3 * singular[0]).sum())  # below: noise, which whitening would blow up
    num = min(projector.out_features, rank)
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()  # the sign of a direction is arbitrary: fix it
    deviations = singular[:num] / len(x) ** 0.5
    weight = projector.weight.double().cpu() * 1e-3
    weight[:num] = directions[:num] / deviations[:, None]
    projector.weight.copy_(weight)
    centre(projector, states)


@torch.no_grad()
def centre(projector: nn.Linear, states: Tensor) -> None:
    """Set the projector's bias so that it maps the mean of `states` [n, h] to 0."""
    mean = states.double().cpu().mean(dim=0)
    projector.bias.copy_(-projector.weight.double().cpu() @ mean)


@torch.no_grad()
def scale_visual_words(model: MLRMModel, batches: Iterable[NoteBatch], gain: float) -> None:
    """Scale the connector's last layer: these notes' visual embeddings get `gain` times a word embedding's length.

    Lengths are root mean squares, over the images' visual embeddings and over the notes' tokens. Does nothing if no
    note has an image, or the prompt has no place for one.
    """
    if model.connector is None:
        return
    visual, words = [], []
    for batch in batches:
        visual.append(model.connector(batch.patches[batch.has_image]).square().sum(-1).flatten())
        text = batch.attention_mask.bool() & ~batch.image_mask
        words.append(model.get_input_embeddings()(batch.input_ids[text]).square().sum(-1))
    if not len(visual_squares := torch.cat(visual)):
        return
    factor = gain * (torch.cat(words).mean() / visual_squares.mean()).sqrt()
    for weight in model.connector.last.parameters():
        weight.mul_(factor)


@torch.no_grad()
def scale_branch(fusion: LateFusion, branch: Tensor, factor: Tensor) -> Tensor:
    """Multiply the linear layer that computes v by `factor`. Returns the new v [n, h] of notes whose v was `branch`."""
    for weight in fusion.visual.parameters():
        weight.mul_(factor.to(weight.dtype))
    return branch * factor.to(branch.dtype)


@torch.no_grad()
def _states(model: MLRMModel, batches: Iterable[NoteBatch]) -> tuple[Tensor, Tensor | None]:
    """The LLM's n_m before the fusion [n, h], and v [n, h] if the method fuses."""
    llm, branch = [], []
    for batch in batches:
        states = model.states(batch)
        llm.append(states.llm_multimodal)
        if states.global_branch is not None:
            branch.append(states.global_branch)
    return torch.cat(llm), torch.cat(branch) if branch else None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.training.initialise", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    NoteInputs.add_arguments(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train-days", nargs=2, metavar=("START", "END"), help=TRAIN_DAYS_HELP)
    args = parser.parse_args()
    with user_errors():
        config, inputs = load_config(args.config), NoteInputs.of(args)
        torch.manual_seed(config.seed)
        model, processor = build_model(config, model_cache(config))
        args.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=args.out) as cache:  # not in /tmp: it may be large
            data = load_pair_dataset(InputReader(processor, inputs), args.pairs, Path(cache))
            initialise(model, data, config)
        save_model(model, processor, inputs.vision, args.out, config, args.train_days)


if __name__ == "__main__":
    main()
