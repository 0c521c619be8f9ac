"""LoReFT on real transformers of tiny random configurations, and against pyreft's own intervention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyreft
import pytest
import torch
import transformers
from torch import Tensor, nn

from orthoserde.integrations.loreft import LoReFT, attach, trainable_parameters
from tests.integrations.toy import close, slow_hook, slow_loreft, strong

WIDTH = 16
WORDS = 50
IDS = torch.randint(3, WORDS, (2, 6), generator=torch.Generator().manual_seed(0))
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


def llama(**arguments: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        **arguments,
    )
    return transformers.LlamaForCausalLM(config).eval()


def t5() -> Any:
    config = transformers.T5Config(
        vocab_size=WORDS, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    config.eos_token_id = None
    return transformers.T5ForConditionalGeneration(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.BertModel(config).eval()


CAUSAL: dict[str, tuple[Callable[[], Any], str]] = {"gpt2": (gpt2, "transformer.h"), "llama": (llama, "model.layers")}
MODELS = pytest.mark.parametrize("kind", CAUSAL)


def make(kind: str, seed: int = 0) -> tuple[Any, dict[str, LoReFT]]:
    torch.manual_seed(seed)
    model = CAUSAL[kind][0]()
    return model, {f"{CAUSAL[kind][1]}.{index}": new() for index in range(2)}


def new(**arguments: Any) -> LoReFT:
    return strong(LoReFT(WIDTH, 4, **arguments))


class Slow:
    """The slow reference on layers, for the prompt's forward alone; layers return a tensor or a tuple."""

    def __init__(self, model: nn.Module, layers: dict[str, LoReFT], positions: str, mask: Tensor | None) -> None:
        self.active = True
        self.handles = [
            model.get_submodule(path).register_forward_hook(self.hook(slow_hook(loreft, positions, mask)))
            for path, loreft in layers.items()
        ]

    def hook(self, slow: Callable[..., tuple[Tensor]]) -> Callable[..., Any]:
        def run(module: nn.Module, args: object, output: Any) -> Any:
            if not self.active:
                return output
            if isinstance(output, Tensor):
                return slow(module, args, (output,))[0]
            return (*slow(module, args, (output[0],)), *output[1:])

        return run

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def generate_by_hand(model: Any, layers: dict[str, LoReFT], positions: str, mask: Tensor | None, steps: int) -> Tensor:
    """Greedy generation in which the slow reference sees the prompt, and what follows runs from the cache."""
    words, cache = IDS, transformers.DynamicCache(config=model.config)
    attends = torch.ones_like(IDS) if mask is None else mask
    with torch.no_grad():
        slow = Slow(model, layers, positions, mask)
        place = (attends.cumsum(-1) - 1).clamp(min=0)
        out = model(words, attention_mask=attends, position_ids=place, past_key_values=cache)
        slow.remove()
        for step in range(steps):
            word = out.logits[:, -1:].argmax(-1)
            words = torch.cat([words, word], 1)
            attends = torch.cat([attends, torch.ones_like(word)], 1)
            if step < steps - 1:
                place = attends.cumsum(-1)[:, -1:] - 1
                out = model(word, attention_mask=attends, position_ids=place, past_key_values=cache)
    return words


GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}


@MODELS
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
@pytest.mark.parametrize("positions", ["f1+l1", "f3", "all"])
def test_a_forward_computes_what_the_slow_reference_computes(kind: str, positions: str, mask: Tensor | None) -> None:
    model, layers = make(kind)
    slow = Slow(model, layers, positions, mask)
    expected = model(IDS, attention_mask=mask).logits
    slow.remove()
    attach(model, layers, positions)
    found = model(IDS, attention_mask=mask).logits
    real = torch.ones_like(IDS) if mask is None else mask
    assert close(found[real != 0], expected[real != 0], 1000)


@MODELS
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("mask", [None, LEFT])
@pytest.mark.parametrize("positions", ["f1+l1", "all"])
def test_generate_intervenes_on_the_prompt_only(kind: str, positions: str, mask: Tensor | None, cache: Any) -> None:
    changed = False
    for seed in range(2):
        model, layers = make(kind, seed)
        attends = torch.ones_like(IDS) if mask is None else mask
        plain = model.generate(IDS, attention_mask=attends, **GREEDY)
        expected = generate_by_hand(model, layers, positions, mask, 8)
        attach(model, layers, positions)
        found = model.generate(IDS, attention_mask=attends, cache_implementation=cache, disable_compile=True, **GREEDY)
        assert torch.equal(found, expected)
        changed |= not torch.equal(plain, found)
    assert changed


@MODELS
def test_padding_a_batch_on_the_left_generates_what_each_prompt_alone_does(kind: str) -> None:
    model, layers = make(kind)
    attach(model, layers)
    together = model.generate(IDS, attention_mask=LEFT, **GREEDY)
    alone = model.generate(IDS[:1, 2:], attention_mask=LEFT[:1, 2:], **GREEDY)
    assert torch.equal(together[0, 2:], alone[0])


@MODELS
def test_beams_and_samples_start_from_the_intervened_prompt(kind: str) -> None:
    model, layers = make(kind)
    adapter = attach(model, layers)
    arguments = {"attention_mask": LEFT, "pad_token_id": 0, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    beams = model.generate(IDS, **arguments)
    one = model.generate(IDS[1:], **{**arguments, "attention_mask": LEFT[1:]})
    assert torch.equal(beams[1], one[0])
    torch.manual_seed(0)
    sampled = model.generate(IDS, attention_mask=LEFT, pad_token_id=0, max_new_tokens=6, do_sample=True)
    assert sampled.shape == (2, 12)
    assert adapter.calls.current is None


@MODELS
def test_without_a_cache_first_tokens_give_what_the_cache_gives(kind: str) -> None:
    model, layers = make(kind)
    attach(model, layers, "f2")
    expected = model.generate(IDS, attention_mask=LEFT, **GREEDY)
    assert torch.equal(model.generate(IDS, attention_mask=LEFT, use_cache=False, **GREEDY), expected)


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT])
@pytest.mark.parametrize("path", ["encoder.layer.0", "encoder"])
def test_bert_and_a_target_that_returns_a_model_output(path: str, mask: Tensor | None) -> None:
    model, loreft = bert(), new()
    plain = model.encoder.layer[0]
    with torch.no_grad():
        if path == "encoder":
            expected = model(IDS, attention_mask=mask).last_hidden_state.clone()
            for i in range(2):
                first = 0 if mask is None else int(mask[i].argmax())
                expected[i, first] = slow_loreft(loreft, expected[i, first])
        else:
            slow = Slow(model, {path: loreft}, "f1", mask)
            expected = model(IDS, attention_mask=mask).last_hidden_state
            slow.remove()
        attach(model, {path: loreft}, "f1")
        found = model(IDS, attention_mask=mask)
    assert close(found.last_hidden_state, expected, 1000)
    assert type(found).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert plain is model.encoder.layer[0]


DECODED = torch.randint(3, WORDS, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("decoder_mask", [None, RIGHT])
@pytest.mark.parametrize("mask", [None, LEFT])
def test_encoder_and_decoder_of_t5_have_a_mask_each(mask: Tensor | None, decoder_mask: Tensor | None) -> None:
    model = t5()
    encoder, decoder = {"encoder.block.0": new()}, {"decoder.block.1": new()}
    arguments = {"attention_mask": mask, "decoder_input_ids": DECODED, "decoder_attention_mask": decoder_mask}
    slow = [Slow(model, encoder, "f1+l1", mask), Slow(model, decoder, "f1+l1", decoder_mask)]
    expected = model(IDS, **arguments).logits
    for each in slow:
        each.remove()
    attach(model, {**encoder, **decoder})
    assert close(model(IDS, **arguments).logits, expected, 1000)


def test_t5_generates_from_the_intervened_prompt() -> None:
    torch.manual_seed(2)
    model = t5()
    layers = {"encoder.block.1": new()}
    arguments = {"attention_mask": LEFT, "max_new_tokens": 8, "do_sample": False}

    def steps() -> Tensor:
        out = model.generate(IDS, output_logits=True, return_dict_in_generate=True, **arguments)
        return torch.stack(out.logits)

    plain = steps()
    slow = Slow(model, layers, "f1+l1", LEFT)
    expected = steps()
    slow.remove()
    adapter = attach(model, layers)
    assert close(steps(), expected, 1000)
    assert not close(plain, expected, 1000)
    assert model.generate(IDS, num_beams=2, **arguments).shape[0] == 2
    assert adapter.calls.current is None


@MODELS
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_gradients_that_it_gives_without(kind: str, reentrant: bool) -> None:
    model, layers = make(kind)
    adapter = attach(model, layers)
    model.train()
    if reentrant:
        model.enable_input_require_grads()

    def gradients(*masks: Tensor) -> list[Tensor]:
        adapter.zero_grad()
        losses = [model(IDS, attention_mask=mask, labels=IDS, use_cache=False).loss for mask in masks]
        torch.autograd.backward(losses)
        return [parameter.grad.clone() for parameter in trainable_parameters(model) if parameter.grad is not None]

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    expected = {masks: gradients(*masks) for masks in ((LEFT,), (RIGHT,), (LEFT, RIGHT))}
    checkpointing = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    for masks, wanted in expected.items():
        found = gradients(*masks)
        assert len(found) == len(wanted) == 6
        assert all(close(mine, theirs, 1000) for mine, theirs in zip(found, wanted, strict=True))


@MODELS
def test_a_copy_generates_what_its_original_does(kind: str) -> None:
    model, layers = make(kind)
    attach(model, layers)
    expected = model.generate(IDS, attention_mask=LEFT, **GREEDY)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for loreft in layers.values():
            loreft.learned_source.bias.add_(5)
    assert torch.equal(copied.generate(IDS, attention_mask=LEFT, **GREEDY), expected)


def test_a_bfloat16_llama() -> None:
    torch.manual_seed(0)
    model = llama()
    adapter = attach(model, {"model.layers.0": new(dropout=0.1)})
    model.to(torch.bfloat16)
    logits = model(IDS, attention_mask=LEFT).logits
    assert logits.dtype == torch.bfloat16
    logits.float().pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    assert adapter.layers["model.layers.0"].rotate_layer.weight.dtype == torch.float32


# Against pyreft


ACTIVATIONS = {None: None, "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "silu": "silu"}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_pyrefts_own_intervention_with_these_weights_computes_the_same(
    dtype: torch.dtype, dropout: float, activation: str | None
) -> None:
    theirs = pyreft.LoreftIntervention(
        embed_dim=WIDTH, low_rank_dimension=4, dropout=dropout, dtype=dtype, act_fn=ACTIVATIONS[activation]
    )
    ours = strong(LoReFT(WIDTH, 4, dropout=dropout, dtype=dtype, activation=activation, structured=False))
    # nn.Module's own loading: theirs is an override that rebuilds the rotation.
    nn.Module.load_state_dict(theirs, ours.state_dict(), strict=False)
    for mine, other in zip(ours.rotate_layer.parameters(), theirs.rotate_layer.parameters(), strict=True):
        assert torch.equal(mine, other)
    hidden = torch.randn(3, 5, WIDTH).to(dtype)
    torch.manual_seed(0)
    expected = theirs(hidden)
    torch.manual_seed(0)
    assert torch.equal(ours(hidden), expected)


def test_pyrefts_model_on_gpt2_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    model = gpt2()
    layers = {f"transformer.h.{index}": new(structured=False) for index in range(2)}
    adapter = attach(model, layers)
    expected = model(IDS, attention_mask=torch.ones_like(IDS)).logits.detach()
    generated = model.generate(IDS, attention_mask=torch.ones_like(IDS), **GREEDY)
    adapter.detach()
    config = pyreft.ReftConfig(
        representations=[
            {
                "layer": index,
                "component": "block_output",
                "low_rank_dimension": 4,
                "intervention": pyreft.LoreftIntervention(
                    embed_dim=WIDTH, low_rank_dimension=4, dropout=0.0, dtype=torch.float32
                ),
            }
            for index in range(2)
        ]
    )
    theirs = pyreft.get_reft_model(model, config)
    theirs.model.eval()
    for intervention, loreft in zip(theirs.interventions.values(), layers.values(), strict=True):
        nn.Module.load_state_dict(intervention, loreft.state_dict(), strict=False)
    places = [[[0, 5], [0, 5]]] * 2
    arguments = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    _, found = theirs(arguments, unit_locations={"sources->base": (None, places)})
    assert close(found.logits, expected, 1000)
    _, text = theirs.generate(
        arguments, unit_locations={"sources->base": (None, places)}, intervene_on_prompt=True, **GREEDY
    )
    assert torch.equal(text, generated)
