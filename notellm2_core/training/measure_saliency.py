"""The saliency scores of a trained model (Eq. 3-6) on a few of its training pairs, in batches like those of training.

python -m notellm2_core.training.measure_saliency --config FILE --model DIR ... --out DIR     writes OUT/saliency.json
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from notellm2_core.config.load import load_config
from notellm2_core.config.methods import get_method
from notellm2_core.config.settings import Config
from notellm2_core.model.encode_images import with_features
from notellm2_core.model.mlrm import MLRMModel, MLRMOutput
from notellm2_core.model.open_inputs import load_model_and_reader
from notellm2_core.model.saliency import Loss, Measurement, measure
from notellm2_core.notes.inputs import NoteInputs
from notellm2_core.notes.processor import NoteBatch
from notellm2_core.runtime.errors import user_errors
from notellm2_core.runtime.files import write_atomically
from notellm2_core.training.data.dataset import PairDataset, load_pair_dataset
from notellm2_core.training.data.sampler import batch_schedule
from notellm2_core.training.objective.losses import BatchLabels, capped_tau
from notellm2_core.training.objective.views import Views, centred, method_losses
from notellm2_core.vision.encoder import VisionEncoder


def measure_on_training_pairs(
    model: MLRMModel, data: PairDataset, config: Config, encoder: VisionEncoder | None = None
) -> Measurement:
    """Measure on `config.evaluation.saliency_pairs` training pairs, chosen by the seed, in batches of one size.

    The number is rounded up to whole batches, and limited to the training pairs. `encoder`: encodes the images of
    `data` if that has pixels. Runs on a GPU if there is one; model and encoder stay there.

    Raises ValueError for fewer than 2 pairs: a single one has no in-batch negatives.
    """
    num_pairs = min(config.evaluation.saliency_pairs, len(data.train_pairs))
    if num_pairs < 2:
        raise ValueError(
            f"saliency needs at least 2 training pairs, got {num_pairs}; set evaluation.saliency_pairs to 0"
        )
    num_batches = math.ceil(num_pairs / config.evaluation.saliency_batch_pairs)
    batch_pairs, contents = math.ceil(num_pairs / num_batches), data.content_ids(data.train_pairs)
    batches = batch_schedule(contents, batch_pairs, num_batches, config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nn.Module.to(model, device)
    if encoder is not None:
        encoder.to(device)

    def batches_with_losses() -> Iterator[tuple[NoteBatch, Loss]]:
        for pairs in batches:
            notes = data.train_pairs[pairs].reshape(-1)  # [2B], pair k: 2k and 2k + 1
            labels = data.labels(notes, config.training.known_positives).to(device)
            yield with_features(data.note_batch(notes).to(device), encoder), _loss(model, config, labels)

    return measure(model, batches_with_losses())


def _loss(model: MLRMModel, config: Config, labels: BatchLabels) -> Loss:
    """The training loss of this model's method on whole notes, for one batch of pairs: Eq. 9, or Eq. 1.

    For Omni-Retrieval it is the multimodal term alone: the others use other inputs.
    """
    method = get_method(model.config.method)
    if "omni" in method.losses:
        method = replace(method, losses=("multimodal",))
    dims = model.config.matryoshka_dims or ()

    def loss(output: MLRMOutput) -> Tensor:
        views: Views = {"multimodal": output.multimodal}
        if "visual" in method.losses and output.visual is not None:
            views = {**views, "visual": output.visual}
        if config.training.centre_embeddings:
            views = centred(views, labels)
        return method_losses(method, views, capped_tau(model.tau), config.training.alpha, labels, dims).total

    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.training.measure_saliency", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    NoteInputs.add_arguments(parser)
    parser.add_argument("--pairs", type=Path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    with user_errors():
        config = load_config(args.config)
        model, reader = load_model_and_reader(args.model, NoteInputs.of(args), config.source.max_image_pixels)
        args.out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".", dir=args.out) as cache:  # not in /tmp: it may be large
            data = load_pair_dataset(reader, args.pairs, Path(cache))
            measurement = measure_on_training_pairs(model, data, config, reader.encoder)
        record = {"method": model.config.method, **asdict(measurement)}
        write_atomically(args.out / "saliency.json", json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
