"""Tiny models of every architecture that packed checkpoints are tested with, and inputs for each."""

from functools import cache

import torch
import transformers as tf


def _ids(**more):
    return {"input_ids": torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(0)), **more}


def _pixels(size):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def _bert():
    return tf.BertForSequenceClassification(
        tf.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    )


def _mobilebert():
    config = tf.MobileBertConfig(
        vocab_size=40, hidden_size=16, embedding_size=8, intra_bottleneck_size=8, true_hidden_size=8, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=12, num_feedforward_networks=2, max_position_embeddings=16,
    )  # fmt: skip
    return tf.MobileBertForSequenceClassification(config)


def _marian():
    config = tf.MarianConfig(
        vocab_size=40, decoder_vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=20, decoder_ffn_dim=20, pad_token_id=0, decoder_start_token_id=1,
        eos_token_id=2, forced_eos_token_id=2, max_position_embeddings=16, scale_embedding=True,
    )  # fmt: skip
    return tf.MarianMTModel(config)


def _t5():
    config = tf.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=20, num_layers=1, num_heads=2, decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def _gpt2():
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16))


def _vit():
    config = tf.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20, image_size=16, patch_size=8
    )
    return tf.ViTForImageClassification(config)


def _mobilenet_v1():
    return tf.MobileNetV1ForImageClassification(tf.MobileNetV1Config(depth_multiplier=0.25, min_depth=4))


def _mobilenet_v2():
    config = tf.MobileNetV2Config(depth_multiplier=0.1, depth_divisible_by=4, min_depth=4, classifier_dropout_prob=0.0)
    return tf.MobileNetV2ForImageClassification(config)


def _resnet():
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    return tf.ResNetForImageClassification(config)


DECODER = {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
MODELS = {
    "bert": (_bert, tf.AutoModelForSequenceClassification, _ids),
    "mobilebert": (_mobilebert, tf.AutoModelForSequenceClassification, _ids),
    "marian": (_marian, tf.AutoModelForSeq2SeqLM, lambda: _ids(**DECODER)),
    "t5": (_t5, tf.AutoModelForSeq2SeqLM, lambda: _ids(**DECODER)),
    "gpt2": (_gpt2, tf.AutoModelForCausalLM, _ids),
    "vit": (_vit, tf.AutoModelForImageClassification, lambda: _pixels(16)),
    "mobilenet_v1": (_mobilenet_v1, tf.AutoModelForImageClassification, lambda: _pixels(32)),
    "mobilenet_v2": (_mobilenet_v2, tf.AutoModelForImageClassification, lambda: _pixels(32)),
    "resnet": (_resnet, tf.AutoModelForImageClassification, lambda: _pixels(16)),
}


@cache
def float_model(name):
    """The model of this name, in eval mode, built once; do not change it."""
    torch.manual_seed(0)
    model = MODELS[name][0]()
    for module in model.modules():  # MobileNets' initial weights give logits of 1e-35, which would test nothing
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return model.eval()


def auto_class(name):
    """The Auto class that loads it."""
    return MODELS[name][1]


def inputs_for(name):
    """Keyword arguments for its forward."""
    return MODELS[name][2]()


def logits(model, name):
    """What it computes for them."""
    with torch.no_grad():
        return model(**inputs_for(name)).logits
