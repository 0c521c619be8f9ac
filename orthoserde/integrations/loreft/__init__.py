"""LoReFT: low-rank linear interventions on the hidden states of a transformer.

``attach(model, {"path.to.layer": LoReFT(hidden_size, rank)})`` puts interventions behind layers of any transformer, by
forward hooks. The adapter becomes a submodule of the model, so that ``parameters()``, ``to()``, ``train()`` and
``orthoserde.save`` see it, and is saved and built without the model it was trained on.

Source: Wu et al. 2024, "ReFT: Representation Finetuning for Language Models", arXiv 2404.03592, section 3.2; its
reference implementation is pyreft (0.1.0 was read), with pyvene (0.1.8) for the hooks.

Example:
    >>> import tempfile, torch, orthoserde
    >>> from orthoserde.integrations.loreft import LoReFT, attach
    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    >>> adapter = attach(model, {"layers.1": LoReFT(8, rank=2)}, positions="f1+l1")
    >>> len(adapter.trainable_parameters())
    3
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = orthoserde.save(adapter, f"{folder}/adapter.safetensors")
    ...     built = orthoserde.build(f"{folder}/adapter.safetensors")
    >>> adapter.detach()
    >>> built.attach(model) is built
    True
"""

from orthoserde.integrations.loreft.adapter import Adapter, attach, detach, trainable_parameters
from orthoserde.integrations.loreft.module import LoReFT
from orthoserde.integrations.loreft.positions import Positions

__all__ = ["Adapter", "LoReFT", "Positions", "attach", "detach", "trainable_parameters"]
