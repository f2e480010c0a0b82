"""One batch through everything, written as a tutorial; read it from top to bottom.

image, caption -> host -> codes -> code-ViT -> three objectives -> host loss + sum -> update
"""

import pytest
import torch

from lgvq_plugin.datasets.base import collate
from lgvq_plugin.host import encode
from lgvq_plugin.training.build import build_dataset, build_host

CONFIG = {
    "model": {
        "learning_rate": 1e-3,
        "target": "lgvq_plugin.hosts.vqvae.VQVAE",
        "params": {
            "n_embed": 32,
            "embed_dim": 16,
            "channels": 16,
            "num_res_blocks": 1,
            "downsample": 8,
            "lossconfig": {
                # The one changed line: the old target behind `lgvq_plugin.over.`
                "target": "lgvq_plugin.over.lgvq_plugin.hosts.vqvae.VQVAELoss",
                "params": {
                    "lgvq": {
                        "guide": {"use": "micro_clip"},
                        "objectives": {"masked_text": {"weight": 0.01}},  # off by default
                        "every": 1,  # by default the first and every fifth batch are aligned
                    }
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def journey():
    torch.manual_seed(0)
    host = build_host(CONFIG)
    dataset = build_dataset({"target": "scenes", "params": {"size": 32, "length": 4}})
    return host, collate([dataset[i] for i in range(4)])


def test_1_a_batch_is_images_and_captions(journey):
    _, batch = journey
    assert batch["image"].shape == (4, 32, 32, 3)
    assert batch["image"].abs().max() <= 1
    assert all(isinstance(caption, str) and caption for caption in batch["caption"])


def test_2_building_the_host_has_attached_the_heads(journey):
    host, _ = journey
    told = host.loss.status()
    assert told["quantizer"] == "quantize"
    assert list(told["objectives"]) == ["global_semantic", "masked_text", "relationship"]


def test_3_the_quantizer_leaves_codes(journey):
    host, batch = journey
    codes = encode(host.eval(), batch["image"].movedim(-1, 1).contiguous())
    assert codes.codes.shape == (4, 16, 16)  # B, h * w, C
    assert codes.grid == (4, 4)
    rows = host.quantize.embedding.weight[codes.indices]
    torch.testing.assert_close(codes.codes, rows)


def test_4_the_guide_reads_the_captions(journey):
    host, batch = journey
    guide = host.loss.alignment.guide
    text = guide.encode(batch["caption"])
    longest = int(text.attention_mask.sum(dim=1).max())
    assert text.tokens.shape == (4, longest, guide.token_dim)
    assert not text.tokens.requires_grad
    for caption, ids in zip(batch["caption"], text.word_ids, strict=True):
        assert int(ids.max()) + 1 >= len(caption.replace(",", " ").replace(".", " ").split())


def test_5_the_code_vit_gives_a_summary_and_tokens(journey):
    host, batch = journey
    codes = encode(host, batch["image"].movedim(-1, 1).contiguous())
    view = host.loss.alignment.view(codes)
    assert view.cls.shape == (4, host.loss.alignment.guide.token_dim)
    assert view.tokens.shape == (4, 16, host.loss.alignment.guide.token_dim)


def test_6_the_loss_is_the_base_loss_plus_the_weighted_terms(journey):
    host, batch = journey
    host.train()
    image = host.get_input(batch, "image")  # here the captions reach the loss
    reconstruction, quant_loss = host(image)
    total, log = host.loss(
        quant_loss, image, reconstruction, 0, 0, last_layer=host.get_last_layer(), split="train"
    )
    alone, _ = host.loss.base_loss(quant_loss, image, reconstruction, 0, 0)
    weights = {"global_semantic": 0.05, "masked_text": 0.01, "relationship": 0.05}
    ours = sum(weight * log[f"train/lgvq/{name}"].item() for name, weight in weights.items())
    assert total.item() == pytest.approx(alone.item() + ours, rel=1e-5)
    assert log["train/lgvq/total"].item() == pytest.approx(ours, rel=1e-5)


def test_7_one_update_moves_encoder_and_heads_but_not_the_guide(journey):
    host, batch = journey
    host.train()
    host.learning_rate = 1e-3
    (optimizer,), _ = host.configure_optimizers()
    guide = host.loss.alignment.guide
    frozen = {name: tensor.clone() for name, tensor in guide.weights().items()}
    before = {name: p.detach().clone() for name, p in host.named_parameters()}
    image = host.get_input(batch, "image")
    reconstruction, quant_loss = host(image)
    loss, _ = host.loss(quant_loss, image, reconstruction, 0, 0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    still = [n for n, p in host.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert still == []
    assert all(torch.equal(frozen[name], now) for name, now in guide.weights().items())


def test_8_a_checkpoint_has_the_hosts_keys_and_ours_but_no_guide(journey):
    host, _ = journey
    bare = {**CONFIG["model"]["params"], "lossconfig": {"target": "torch.nn.MSELoss"}}
    baseline = build_host({"model": {**CONFIG["model"], "params": bare}})
    keys = set(host.state_dict())
    assert {key for key in keys if not key.startswith("loss.lgvq.")} == set(baseline.state_dict())
    result = baseline.load_state_dict(host.state_dict(), strict=False)
    assert result.missing_keys == []
    assert all(key.startswith("loss.lgvq.") for key in result.unexpected_keys)
    vocabulary = host.loss.alignment.guide.vocabulary
    assert all(value.shape != vocabulary.shape for value in host.state_dict().values())
