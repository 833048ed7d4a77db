"""ACE-Step with tiny random weights. It imports what `make test-engines` installs, so import it late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

_END = "<|endoftext|>"
_WIDTH, _TEXT_WIDTH, _SOUND_WIDTH = 32, 32, 8


def make_weights(folder: Path, *, turbo: bool) -> Path:
    """A whole pipeline of a few thousand random numbers, that encodes bytes and decodes to 48 kHz stereo."""
    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([_END, *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    AceStepPipeline(
        vae=AutoencoderOobleck(
            encoder_hidden_size=8,
            downsampling_ratios=[2, 4, 4, 6, 10],
            channel_multiples=[1, 1, 1, 1, 1],
            decoder_channels=8,
            decoder_input_channels=_SOUND_WIDTH,
            audio_channels=2,
            sampling_rate=48000,
        ),
        text_encoder=Qwen3Model(
            Qwen3Config(
                vocab_size=len(vocabulary),
                hidden_size=_TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=1,
                max_position_embeddings=8192,
                **heads,
            )
        ).eval(),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokens, eos_token=_END, pad_token=_END, padding_side="left"
        ),
        transformer=AceStepTransformer1DModel(
            hidden_size=_WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            in_channels=3 * _SOUND_WIDTH,
            audio_acoustic_hidden_dim=_SOUND_WIDTH,
            patch_size=2,
            sliding_window=16,
            is_turbo=turbo,
            model_version="turbo" if turbo else "base",
            **heads,
        ),
        condition_encoder=AceStepConditionEncoder(
            hidden_size=_WIDTH,
            intermediate_size=64,
            text_hidden_dim=_TEXT_WIDTH,
            timbre_hidden_dim=_SOUND_WIDTH,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
            sliding_window=16,
            **heads,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
    ).save_pretrained(folder)
    return folder
