"""Every method of Table 4 through every command that reads or writes its model."""

import json
from pathlib import Path

import numpy as np
import pytest

from notellm2_core.config.methods import METHODS
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.inference import export
from notellm2_core.inference.embedder import Embedder
from notellm2_core.inference.package import package
from notellm2_core.training import measure_saliency as saliency
from tests.support.world import World, tiny_config, train, write_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_rank")]
INIT = {"pca_projector": True, "fusion_scale": 0.3, "gate_bias": -1.0, "visual_token_gain": 1.0, "num_pca_notes": 16}


@pytest.mark.parametrize(("method", "connector"), [*((m, "qformer") for m in METHODS), ("notellm2", "linear")])
def test_trained_measured_exported_packaged(method: str, connector: str, world: World, tmp_path: Path) -> None:
    """Two steps from a balanced initial model; then saliency, an export of three kinds of input, and a package.

    A method without visual prompt has no S_v, one without fusion no gate, and one without visual word no L_v.
    """
    switches, training = METHODS[method], {"num_steps": 2, "validate_every_steps": 2}
    sizes = {"kind": connector, "num_queries": 2, "num_layers": 1, "hidden_size": 16, "num_heads": 2}
    config = tiny_config(training, method=method, connector=sizes, init=INIT, matryoshka_dims=(4,))
    out = train(world, config, tmp_path)
    summary = json.loads((out / "training.json").read_text())
    assert np.isfinite([summary["loss_last"], summary["validation_loss"]]).all()
    assert ("gate_mean" in summary) == switches.late_fusion
    assert ("loss_v" in summary) == ("visual" in switches.losses)
    assert ("loss_cross" in summary) == ("omni" in switches.losses)

    config_file = write_config(tmp_path / "c.yaml", config)
    options = ["--config", str(config_file), "--model", str(out), *world.inputs.arguments()]
    saliency.main([*options, "--pairs", str(world.path("pairs")), "--out", str(tmp_path / "saliency")])
    layers = json.loads((tmp_path / "saliency" / "saliency.json").read_text())["layers"]
    assert all((layer["visual"] is not None) == switches.visual_prompt for layer in layers)

    export.main([*options, "--inputs", "multimodal,image,text", "--out", str(tmp_path / "embeddings")])
    vectors = {k: read_embeddings(tmp_path / "embeddings" / k).vectors for k in ("multimodal", "image", "text")}
    assert all(np.allclose(np.linalg.norm(v, axis=1), 1, atol=1e-5) for v in vectors.values())
    assert np.abs(vectors["multimodal"] - vectors["text"]).max() > 1e-4  # the image changes the vector, by every method

    package(out, tmp_path / "package")
    embedder = Embedder.from_pretrained(tmp_path / "package")
    assert embedder.embed([{"title": "a"}, {}, {"content": "b " * 500}], dim=4).shape == (3, 4)
