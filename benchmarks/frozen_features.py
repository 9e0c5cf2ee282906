"""A model that learns from clicks in seconds: frozen random features of text and picture, and a trained projector.

The decoder is one random layer over whole words of the demo world; the vision encoder is the tiny one. Neither is
trained. The projector is: Eq. 1 over the related notes of a log (Eq. 2), as in the pipeline's training. What it knows
of themes and styles, it has from clicks alone. It is saved, and served, like any other model.

N: notes, h: width of the features, d: of the vectors, P: pairs.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import notellm2_core.runtime.torch_compat  # noqa: F401, before transformers

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from notellm2_core.config.settings import Config
from notellm2_core.demo import words
from notellm2_core.inference.embedder import Embedder
from notellm2_core.model.build import build_model
from notellm2_core.notes.note import NoteWithImage
from notellm2_core.notes.prompts import PROMPTS
from notellm2_core.training.initialise import scale_branch, set_pca
from notellm2_core.training.objective.losses import contrastive_loss
from notellm2_core.training.state.save import save_model
from notellm2_core.vision.encoder import load_vision_encoder

WIDTH, DIM = 256, 32  # h, d
_BATCH_NOTES, _BATCH_PAIRS, _STEPS, _LEARNING_RATE, _TAU = 32, 64, 100, 1e-2, 2.5
_TARGETS = 10  # related notes of a note


def write_decoder(folder: Path) -> Path:
    """A decoder of one random layer, and its tokenizer of the demo world's words."""
    texts = [phrase for phrases in words.THEMES.values() for phrase in phrases]
    texts += [*words.TITLES, *words.SENTENCES, *words.FILLERS, *words.TOPICS]
    texts += [word for group in words.POOR_TITLES for word in group]
    texts += [piece for prompt in PROMPTS.values() for piece in prompt if isinstance(piece, str)]
    split = pre_tokenizers.Whitespace()
    vocabulary = {"<unk>": 0}
    for text in texts:
        for word, _ in split.pre_tokenize_str(text.lower()):
            vocabulary.setdefault(word, len(vocabulary))
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    architecture = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=4096, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    LlamaModel(architecture).save_pretrained(folder)
    return folder


class FrozenFeatures:
    """The features of notes, and models that differ in their projectors."""

    def __init__(self, config: Config, folder: Path, first: Sequence[NoteWithImage]) -> None:
        """first: notes by which the picture is given as much weight as the text."""
        encoder = load_vision_encoder(config.model.vision)
        encoder.save_pretrained(folder / "vision")
        self._config, self._vision = config, folder / "vision"
        self._model, self._processor = build_model(config, folder / "cache")
        self._model.config.encoder_id = encoder.encoder_id
        self._embedder = Embedder(self._model, self._processor, encoder, "cpu")
        states, branch = self._states(first)
        fusion = self._model.fusion
        assert fusion is not None
        scale_branch(fusion, branch, states.std(0).mean() / branch.std(0).mean())
        for weight in fusion.gate.parameters():  # the mean of text and picture
            nn.init.zeros_(weight)

    @torch.inference_mode()
    def of(self, notes: Sequence[NoteWithImage]) -> Tensor:
        """[N, h] what the projector reads."""
        states, branch = self._states(notes)
        assert self._model.fusion is not None
        return self._model.fusion(branch, states)[0].clone()

    @torch.no_grad()
    def _states(self, notes: Sequence[NoteWithImage]) -> tuple[Tensor, Tensor]:
        images, image_ids = self._embedder.read_images(notes, "multimodal")
        known = list(dict.fromkeys(i for i in image_ids if i is not None))
        features, row_of = images.load(known), {image_id: row for row, image_id in enumerate(known)}
        rows = np.array([row_of.get(str(image_id), 0) for image_id in image_ids])
        has_image = np.array([image_id is not None for image_id in image_ids])
        encoded = [self._processor.encode(note.note) for note in notes]
        parts = []
        for start in range(0, len(notes), _BATCH_NOTES):
            batch = slice(start, start + _BATCH_NOTES)
            read = features.patches[rows[batch]], features.global_feature[rows[batch]], has_image[batch]
            parts.append(self._model.states(self._processor.collate(encoded[batch], *read)))
        multimodal = [p.llm_multimodal for p in parts if p.llm_multimodal is not None]
        return torch.cat(multimodal), torch.cat([p.global_branch for p in parts if p.global_branch is not None])

    def save(self, projector: nn.Linear, out: Path) -> None:
        """Write the model with this projector as the training command does."""
        self._model.projector.load_state_dict(projector.state_dict())
        save_model(self._model, self._processor, self._vision, out, self._config)

    def embed(self, projector: nn.Linear, notes: Sequence[NoteWithImage]) -> np.ndarray:
        """[N, d] by the whole model, as a service does it."""
        self._model.projector.load_state_dict(projector.state_dict())
        return self._embedder.embed(notes)


def related_pairs(clicks: Mapping[str, Sequence[int]]) -> np.ndarray:
    """[P, 2] rows of notes: of each note the related ones with the highest scores of Eq. 2. clicks: of each user, by
    time.
    """
    scores: defaultdict[tuple[int, int], float] = defaultdict(float)
    for notes in clicks.values():
        for place, query in enumerate(notes):
            for target in notes[place + 1 :]:
                scores[query, target] += 1 / len(notes)
    targets = defaultdict(list)
    for (query, target), score in scores.items():
        targets[query].append((-score, target))
    return np.array([(query, target) for query, found in targets.items() for _, target in sorted(found)[:_TARGETS]])


def new_projector(features: Tensor) -> nn.Linear:
    """Onto the principal directions of these features [N, h]: what is known before any click."""
    torch.manual_seed(0)
    projector = nn.Linear(features.shape[1], DIM)
    set_pca(projector, features)
    return projector


def train_projector(start: nn.Linear, features: Tensor, pairs: np.ndarray, seed: int) -> nn.Linear:
    """A few steps of Eq. 1 from `start`, which stays as it is. features [N, h], pairs [P, 2]."""
    rng, projector = np.random.default_rng(seed), copy.deepcopy(start).requires_grad_()
    tau = torch.full((1,), _TAU)
    optimizer = torch.optim.AdamW(projector.parameters(), _LEARNING_RATE)
    for _ in range(_STEPS):
        batch = pairs[rng.choice(len(pairs), _BATCH_PAIRS)].reshape(-1)
        loss = contrastive_loss(projector(features[batch]), tau)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return projector.requires_grad_(False)


def vectors_of(projector: nn.Linear, features: Tensor) -> np.ndarray:
    """Unit vectors [N, d]."""
    vectors: np.ndarray = functional.normalize(projector(features), dim=-1).numpy()
    return vectors
