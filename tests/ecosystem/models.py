"""Models of transformers with tiny random configurations, and the three forms in which their weights are normed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    FastSpeech2ConformerHifiGan,
    FastSpeech2ConformerHifiGanConfig,
    HubertConfig,
    HubertModel,
    MimiConfig,
    MimiModel,
    SEWConfig,
    SEWModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    UniSpeechConfig,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    UnivNetConfig,
    UnivNetModel,
    VitsConfig,
    VitsModel,
    Wav2Vec2Config,
    Wav2Vec2ConformerConfig,
    Wav2Vec2ConformerModel,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

SPEECH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 8,
}
VOCODER: dict[str, Any] = {
    "model_in_dim": 6,
    "upsample_initial_channel": 8,
    "upsample_rates": [2, 2],
    "upsample_kernel_sizes": [4, 4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]],
}
WAVE = torch.linspace(-1, 1, 320).sin().reshape(1, 320)
MEL = torch.linspace(-1, 1, 42).sin().reshape(1, 7, 6)


def _waveform(model: nn.Module) -> list[Tensor]:
    return [model(WAVE).last_hidden_state]


def _codec(model: nn.Module) -> list[Tensor]:
    found = model(WAVE[:, None])
    return [found.audio_values, found.audio_codes]


def _mel(model: nn.Module) -> list[Tensor]:
    return [model(MEL)]


def _univnet(model: nn.Module) -> list[Tensor]:
    return [model(MEL, noise_sequence=torch.linspace(-1, 1, 28).reshape(1, 7, 4)).waveforms]


def _text(model: nn.Module) -> list[Tensor]:
    # The duration and the prior are drawn at random.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [model(torch.tensor([[1, 2, 3, 4, 5]])).waveform]


def _normed(model: nn.Module) -> nn.Module:
    """The model, its weights normed by its own method, as its authors trained it."""
    model.apply_weight_norm()  # type: ignore[operator]
    return model


def _vits() -> nn.Module:
    model: nn.Module = VitsModel(
        VitsConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            ffn_dim=8,
            flow_size=8,
            spectrogram_bins=5,
            prior_encoder_num_flows=1,
            prior_encoder_num_wavenet_layers=2,
            posterior_encoder_num_wavenet_layers=2,
            duration_predictor_num_flows=1,
            duration_predictor_filter_channels=8,
            depth_separable_num_layers=1,
            upsample_initial_channel=8,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
        )
    )
    _normed(model.get_submodule("decoder"))
    return model


def _mimi() -> nn.Module:
    model: nn.Module = MimiModel(
        MimiConfig(
            audio_channels=1,
            hidden_size=8,
            num_filters=4,
            num_residual_layers=1,
            upsampling_ratios=[4, 2],
            codebook_size=8,
            codebook_dim=8,
            vector_quantization_hidden_dimension=8,
            num_quantizers=2,
            num_semantic_quantizers=1,
            upsample_groups=8,
            num_hidden_layers=1,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            sampling_rate=320,
            frame_rate=20,
        )
    )
    for part in model.modules():
        if type(part).__name__ in ("MimiConv1d", "MimiConvTranspose1d"):
            _normed(part)
    return model


@dataclass(frozen=True)
class Case:
    """A model.

    Attributes:
        make: Makes it with parametrizations, from the global seed.
        outputs: Runs it on an input that is the same in every call.
    """

    make: Callable[[], nn.Module]
    outputs: Callable[[nn.Module], list[Tensor]]


CASES: dict[str, Case] = {
    "wav2vec2": Case(lambda: Wav2Vec2Model(Wav2Vec2Config(**SPEECH)), _waveform),
    "wav2vec2-conformer": Case(lambda: Wav2Vec2ConformerModel(Wav2Vec2ConformerConfig(**SPEECH)), _waveform),
    "hubert": Case(lambda: HubertModel(HubertConfig(**SPEECH)), _waveform),
    "wavlm": Case(lambda: WavLMModel(WavLMConfig(**SPEECH, num_buckets=8, max_bucket_distance=16)), _waveform),
    "sew": Case(lambda: SEWModel(SEWConfig(**SPEECH, squeeze_factor=2)), _waveform),
    "unispeech": Case(lambda: UniSpeechModel(UniSpeechConfig(**SPEECH)), _waveform),
    "unispeech-sat": Case(lambda: UniSpeechSatModel(UniSpeechSatConfig(**SPEECH)), _waveform),
    "encodec": Case(
        lambda: EncodecModel(
            EncodecConfig(
                hidden_size=8, num_filters=4, upsampling_ratios=[4, 2], codebook_size=8, target_bandwidths=[24.0]
            )
        ),
        _codec,
    ),
    "dac": Case(
        lambda: _normed(
            DacModel(
                DacConfig(
                    encoder_hidden_size=4,
                    downsampling_ratios=[2, 4],
                    decoder_hidden_size=16,
                    n_codebooks=2,
                    codebook_size=8,
                    codebook_dim=4,
                )
            )
        ),
        _codec,
    ),
    "mimi": Case(_mimi, _codec),
    "vits": Case(_vits, _text),
    "speecht5-hifigan": Case(lambda: _normed(SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER))), _mel),
    "fastspeech2-hifigan": Case(
        lambda: _normed(FastSpeech2ConformerHifiGan(FastSpeech2ConformerHifiGanConfig(**VOCODER))), _mel
    ),
    "univnet": Case(
        lambda: _normed(
            UnivNetModel(
                UnivNetConfig(
                    model_in_channels=4,
                    model_hidden_channels=4,
                    num_mel_bins=6,
                    resblock_kernel_sizes=[3],
                    resblock_stride_sizes=[4],
                    resblock_dilation_sizes=[[1, 3]],
                    kernel_predictor_num_blocks=1,
                    kernel_predictor_hidden_channels=4,
                )
            )
        ),
        _univnet,
    ),
}


def build(name: str, form: str, seed: int) -> nn.Module:
    """A model in one of the ``FORMS``, in evaluation mode; its normed weights are not at their initial magnitude."""
    torch.manual_seed(seed)
    model = CASES[name].make().eval()
    with torch.no_grad():
        for module in normed_modules(model):
            magnitude, _ = originals_of(module)
            magnitude.mul_(torch.rand_like(magnitude) + 0.5)
    FORMS[form](model)
    return model


def outputs_of(name: str, model: nn.Module) -> list[Tensor]:
    """What the model makes of its input, without gradients."""
    with torch.no_grad():
        return CASES[name].outputs(model)


def normed_modules(model: nn.Module) -> list[nn.Module]:
    """Modules whose weight torch's weight_norm parametrizes."""
    return [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]


def originals_of(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Magnitude and direction."""
    part = module.get_submodule("parametrizations.weight")
    return part.get_parameter("original0"), part.get_parameter("original1")


def to_hooks(model: nn.Module) -> None:
    """Put ``torch.nn.utils.weight_norm`` in the place of parametrizations, with the same state."""
    for module in normed_modules(model):
        magnitude, direction = (original.detach().clone() for original in originals_of(module))
        dim = module.get_submodule("parametrizations.weight.0").dim
        parametrize.remove_parametrizations(module, "weight")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the older form is deprecated, and still what hubs hold
            torch.nn.utils.weight_norm(module, "weight", None if dim == -1 else dim)  # type: ignore[arg-type]
        with torch.no_grad():
            module.get_parameter("weight_g").copy_(magnitude)
            module.get_parameter("weight_v").copy_(direction)


def to_plain(model: nn.Module) -> None:
    """Leave the computed weights alone, as ``remove_weight_norm`` does."""
    for module in normed_modules(model):
        parametrize.remove_parametrizations(module, "weight")


#: How a normed weight is held: by parametrizations, by the hooks that came before them, or not at all.
FORMS: dict[str, Callable[[nn.Module], None]] = {
    "parametrizations": lambda model: None,
    "hooks": to_hooks,
    "plain": to_plain,
}
