"""Whole trainings: precision, accumulation, Lightning, SEED-Voken's and LlamaGen's own loops."""

import copy
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lookalikes import plain, seed_voken
from lookalikes.cases import CAPTIONS, CASES, LGVQ, WEIGHTS, lossconfig
from lookalikes.parts import VectorQuantizer, from_config
from torch import nn
from torch.utils.data import DataLoader

from lgvq_plugin import attach
from lgvq_plugin.host import decode, encode, reconstruct
from lgvq_plugin.sockets import ConfigError

BY_NAME = {case.name: case for case in CASES}
VQVAE = BY_NAME["vqvae"]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
]


class Samples(torch.utils.data.Dataset):
    def __init__(self, count=6, captions=CAPTIONS):
        self.count, self.captions = count, captions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(16, 16, 3, generator=generator) * 2 - 1
        return {"image": image, "caption": self.captions[index % len(self.captions)]}


def changed(before, module):
    return [n for n, p in module.named_parameters() if not torch.equal(before[n], p)]


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# -- precision and accumulation ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        ("corrected", torch.bfloat16),
        pytest.param("corrected", torch.float16, marks=pytest.mark.slow),
        ("paper", torch.bfloat16),
    ],
)
def test_autocast_gives_the_losses_of_float32(recipe, dtype):
    logs = []
    for enabled in (False, True):
        host, loss = VQVAE.build({**LGVQ, "recipe": recipe})
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype, enabled=enabled):
            total = VQVAE.step(host, VQVAE.batch(), loss)
        assert total.isfinite()
        assert {p.dtype for p in loss.alignment.parameters()} == {torch.float32}
        gradients = [p.grad for p in loss.alignment.parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        logs.append(loss.latest)
    for name in WEIGHTS:
        exact, rounded = (float(log[f"train/lgvq/{name}"]) for log in logs)
        assert rounded == pytest.approx(exact, rel=0.05, abs=0.02)
        assert logs[1][f"train/lgvq/{name}"].dtype == torch.float32


@pytest.mark.slow
@pytest.mark.extended
def test_compiled_model_and_code_vit_give_the_eager_losses():
    found = {}
    for compiled in (False, True):
        torch.manual_seed(3)
        model = VQVAE.build(None)[0]
        handle = attach(model, guide={"use": "micro_clip"})
        run = model
        if compiled:
            run = torch.compile(model, backend="aot_eager")
            handle.heads.code_vit.compile(backend="aot_eager")
        optimizer = torch.optim.SGD([*model.parameters(), *handle.parameters()], lr=0.1)
        images, losses = VQVAE.batch()["image"].movedim(-1, 1), []
        for _ in range(2):
            reconstruction, quant_loss = run(images)
            text_loss, _ = handle.loss(CAPTIONS)
            optimizer.zero_grad()
            ((reconstruction - images).square().mean() + quant_loss + text_loss).backward()
            optimizer.step()
            losses.append(text_loss.item())
        found[compiled] = losses, model.state_dict(), handle.heads.state_dict()
    assert found[False][0] == pytest.approx(found[True][0], rel=1e-5)
    assert found[True][0][0] != found[True][0][1]
    for part in (1, 2):  # the same names too
        torch.testing.assert_close(found[True][part], found[False][part], rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_the_sum_of_their_batches():
    """Two batches of one step draw different masks, and both reach heads and host."""
    host, loss = VQVAE.build(LGVQ)
    host.quantize.eval()  # an EMA codebook would move in between
    batches = [VQVAE.batch(), VQVAE.batch(CAPTIONS[::-1])]

    def backward(batch):
        x = host.get_input(batch, "image")
        xrec, quant_loss = host(x)
        total, _ = host.loss(quant_loss, x, xrec, 0, 3, last_layer=host.get_last_layer())
        total.backward()
        return {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}

    loss.alignment._draws.clear()
    both = [backward(batch) for batch in batches][-1]
    single = []
    loss.alignment._draws.clear()
    for batch in batches:
        host.zero_grad()
        single.append(backward(batch))
    for name, gradient in both.items():
        expected = sum(part[name] for part in single if name in part)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    again = [copy.deepcopy(loss.alignment._generator(4)).get_state() for _ in range(2)]
    assert not torch.equal(*again)


def test_a_term_that_is_not_finite_is_named_with_its_step():
    host, loss = VQVAE.build(LGVQ)
    with torch.no_grad():
        next(loss.alignment.objectives["masked_text"].parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 0: lgvq objective masked_text is nan"):
        VQVAE.step(host, VQVAE.batch(), loss)


def test_a_term_that_is_not_finite_can_be_left_out():
    host, loss = VQVAE.build({**LGVQ, "on_nonfinite": "skip"})
    with torch.no_grad():
        next(loss.alignment.objectives["masked_text"].parameters()).fill_(float("inf"))
    log = {}
    x = host.get_input(VQVAE.batch(), "image")
    xrec, quant_loss = host(x)
    total, log = host.loss(quant_loss, x, xrec, 0, 0, last_layer=host.get_last_layer())
    base, _ = host.loss.base_loss(quant_loss, x, xrec, 0, 0)
    others = sum(WEIGHTS[n] * log[f"train/lgvq/{n}"] for n in ("global_semantic", "relationship"))
    torch.testing.assert_close(total, base + others)


@pytest.mark.parametrize("which", ["heads", "host"])
def test_under_a_foreign_trainer_no_bad_gradient_reaches_a_weight(which, caplog):
    host, loss = VQVAE.build(LGVQ)
    optimizer = torch.optim.Adam(host.parameters(), 1e-3)
    parts = (host.encoder, host.decoder, loss.alignment)  # the codebook follows its restarts too
    before = [p.detach().clone() for part in parts for p in part.parameters()]
    module, told = (loss.alignment, "heads") if which == "heads" else (host.decoder, "decoder")

    def is_unchanged():
        now = [p for part in parts for p in part.parameters()]
        return all(torch.equal(a, b) for a, b in zip(before, now, strict=True))

    def step():
        x = host.get_input(VQVAE.batch(), "image")
        xrec, quant_loss = host(x)
        host.loss(quant_loss, x, xrec, 0, 0, last_layer=host.get_last_layer())[0].backward()
        next(module.parameters()).grad.view(-1)[0] = torch.nan
        optimizer.step()

    with pytest.raises(FloatingPointError, match=rf"update 1: .*in .*{told}"):
        step()
    assert is_unchanged()
    loss._config = replace(loss._config, on_nonfinite="skip")
    loss._gradient_check = None
    step()
    assert "this update is left out" in caplog.text
    assert is_unchanged()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 5])
def test_bad_gradients_of_all_aligned_batches_end_the_training(every):
    """Batches without our terms in between do not count as healthy."""
    host, loss = VQVAE.build({**LGVQ, "every": every, "on_nonfinite": "skip"})
    optimizer = torch.optim.Adam(host.parameters(), 1e-3)
    next(loss.alignment.code_vit.parameters()).register_hook(lambda gradient: gradient * torch.nan)

    def steps(count):
        for _ in range(count):
            x = host.get_input(VQVAE.batch(), "image")
            xrec, quant_loss = host(x)
            host.loss(quant_loss, x, xrec, 0, 0, last_layer=host.get_last_layer())[0].backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(24 if every == 1 else 119)  # of which 24 are aligned
    with pytest.raises(FloatingPointError, match="25 updates in a row"):
        steps(1)


# -- SEED-Voken: its own manual optimization under a real Trainer --------------------------------

CLI = {  # what LightningCLI reads: class_path and init_args, the loss a taming-style target inside
    "class_path": "lookalikes.seed_voken.IBQ",
    "init_args": {
        "ddconfig": {"z_channels": 8},
        "lossconfig": {
            "target": "lgvq_plugin.over.lookalikes.seed_voken.IBQLoss",
            "params": {"disc_start": 0, "lgvq": LGVQ},
        },
    },
}


def from_cli(config):
    return from_config({"target": config["class_path"], "params": config["init_args"]})


def test_ibq_trains_from_its_cli_config_under_lightning():
    torch.manual_seed(0)
    host = from_cli(CLI)
    before, heads = snapshot(host), snapshot(host.loss.alignment)
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=1, **QUIET)
    loader = DataLoader(Samples(), batch_size=3)
    trainer.fit(host, loader, loader)
    assert len(changed(heads, host.loss.alignment)) == len(heads)
    assert any(name.startswith("encoder") for name in changed(before, host))
    assert any(name.startswith("loss.discriminator") for name in changed(before, host))
    assert "train/total_loss" in trainer.callback_metrics
    assert "train/lgvq/total" in trainer.callback_metrics
    assert not [key for key in host.model_ema.state_dict() if key.startswith("losslgvq")]
    last = trainer.optimizers[0].param_groups
    assert len(last) == 2
    assert last[1]["lr"] == last[0]["lr"]


def test_magvit2_trains_under_lightning_and_has_no_codebook():
    host, loss = BY_NAME["open-magvit2"].build(LGVQ)
    heads = snapshot(loss.alignment)
    trainer = pl.Trainer(max_steps=4, num_sanity_val_steps=1, **QUIET)
    loader = DataLoader(Samples(), batch_size=3)
    trainer.fit(host, loader, loader)
    assert len(changed(heads, loss.alignment)) == len(heads)
    codes = encode(host, BY_NAME["open-magvit2"].images())
    assert codes.codebook is None
    assert set(codes.codes.unique().tolist()) == {-1.0, 1.0}


def test_a_codebook_gradient_without_a_codebook_is_told():
    host, loss = BY_NAME["open-magvit2"].build({**LGVQ, "codebook_gradient": True})
    with pytest.raises(ConfigError, match="no codebook that takes a gradient"):
        BY_NAME["open-magvit2"].step(host, BY_NAME["open-magvit2"].batch(), loss)


@pytest.mark.parametrize("name", ["latent-diffusion", "vit-vqgan", "llamagen"])
def test_a_codebook_gradient_reaches_the_codebook(name):
    case = BY_NAME[name]
    gradients = []
    for wanted in (False, True):
        host, loss = case.build({**LGVQ, "codebook_gradient": wanted})
        torch.manual_seed(7)
        case.step(host, case.batch(), loss)
        gradients.append(host.get_submodule(case.quantizer).embedding.weight.grad.clone())
    assert not torch.allclose(*gradients)


def test_latent_diffusion_validates_with_and_without_its_average():
    case = BY_NAME["latent-diffusion"]
    host, loss = case.build(LGVQ)
    case.step(host, case.batch(), loss)
    host.on_train_batch_end()
    host.eval()
    with torch.no_grad():
        log = host.validation_step(case.batch(), 0)
    for split in ("val", "val_ema"):
        assert f"{split}/lgvq/total" in log
        assert f"{split}/rec_loss" in log
    host.train()
    case.step(host, case.batch(), loss)


# -- attach, in modules and loops of one's own ---------------------------------------------------


class OwnModule(pl.LightningModule):
    """Automatic optimization; three lines are ours."""

    def __init__(self):
        super().__init__()
        self.net = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
        self.handle = attach(self, **LGVQ)
        self.heads = self.handle.heads

    def training_step(self, batch, batch_idx):
        x = batch["image"].movedim(-1, 1)
        xrec, aux = self.net(x)
        ours, log = self.handle.loss(batch["caption"])
        self.log_dict(log)
        return F.mse_loss(xrec, x) + aux + ours

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


@pytest.mark.slow
def test_a_lightning_module_of_ones_own_with_automatic_optimization(tmp_path):
    module = OwnModule()
    heads = snapshot(module.heads)
    settings = {**QUIET, "enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer = pl.Trainer(max_epochs=1, accumulate_grad_batches=2, **settings)
    trainer.fit(module, DataLoader(Samples(), batch_size=3))
    assert len(changed(heads, module.heads)) == len(heads)
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    again = OwnModule.load_from_checkpoint(tmp_path / "own.ckpt", weights_only=True)
    assert changed(snapshot(module.heads), again.heads) == []
    twin = copy.deepcopy(module)
    twin.net(torch.rand(3, 3, 16, 16))
    assert twin.handle.loss(CAPTIONS)[0].requires_grad
    assert module.handle._hook.codes is None


class Automatic(pl.LightningModule):
    """A host with neither `get_input` nor a step of two optimizers; only its loss is ours."""

    def __init__(self, config):
        super().__init__()
        self.loss = from_config(config)
        self.quantize = VectorQuantizer(16, 8)
        self.net = plain.Autoencoder(nn.Identity(), place=(0, None))

    def _value(self, batch):
        x = batch["image"].movedim(-1, 1)
        quant, aux, _ = self.quantize(self.net.encoder(x))
        return self.loss(self.net.decoder(quant), x) + aux

    def training_step(self, batch):
        return self._value(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._value(batch))

    def configure_optimizers(self):
        parts = (self.quantize, self.net.encoder, self.net.decoder)
        optimizer = torch.optim.Adam([p for m in parts for p in m.parameters()], lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}


def test_a_lightning_host_with_automatic_optimization():
    config = {"target": "lgvq_plugin.over.torch.nn.MSELoss", "params": {"lgvq": LGVQ}}
    host = Automatic(config)
    heads = snapshot(host.loss.alignment)
    trainer = pl.Trainer(max_epochs=1, num_sanity_val_steps=1, **QUIET)
    loader = DataLoader(Samples(), batch_size=3)
    trainer.fit(host, loader, loader)
    assert len(changed(heads, host.loss.alignment)) == len(heads)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert host.loss._captions is None


def test_the_heads_alone_are_saved_and_read(tmp_path):
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    handle = attach(model, **LGVQ)
    handle.save_pretrained(tmp_path)
    other = attach(plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1)), **LGVQ, seed=1)
    assert changed(snapshot(handle.heads), other.heads) != []
    other.load_pretrained(tmp_path)
    assert changed(snapshot(handle.heads), other.heads) == []
    narrow = attach(plain.Autoencoder(VectorQuantizer(16, 4), width=4, place=(0, 1)), **LGVQ)
    with pytest.raises(ConfigError, match="holds other heads"):
        narrow.load_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no heads at"):
        narrow.load_pretrained(tmp_path / "nowhere")


def test_attach_to_an_optimizer_and_back():
    model = plain.Autoencoder(VectorQuantizer(16, 8), place=(0, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = copy.deepcopy(optimizer.state_dict())
    handle = attach(model, optimizer=optimizer, **LGVQ)
    told = handle.status()
    assert told["objectives"] == WEIGHTS
    assert told["parameters"] == sum(p.numel() for p in handle.parameters())
    heads = snapshot(handle.heads)
    model(torch.rand(3, 3, 16, 16))
    handle.loss(CAPTIONS)[0].backward()
    optimizer.step()
    assert len(changed(heads, handle.heads)) == len(heads)
    handle.detach()
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    with pytest.raises(RuntimeError, match="saw no codes"):
        handle.loss(CAPTIONS)


def test_diffusers_is_encoded_reconstructed_and_decoded():
    pytest.importorskip("diffusers", reason="diffusers is in the extra [diffusers]")
    case = BY_NAME["diffusers"]
    host, _ = case.build()
    host.eval()
    x = case.images()
    codes = encode(host, x)
    grid = codes.codes.mT.unflatten(2, codes.grid)
    torch.testing.assert_close(decode(host, grid), reconstruct(host, x), rtol=1e-4, atol=1e-5)


def test_the_embedded_guide_does_too():
    lgvq = {**LGVQ, "guide": {"use": "micro_clip"}}
    host, loss = VQVAE.build(lgvq)
    before = snapshot(loss.alignment)
    VQVAE.step(host, VQVAE.batch(), loss)
    assert len(changed(before, loss.alignment)) == len(before)


def test_the_old_form_and_the_new_are_one_line_apart():
    old = lossconfig("lookalikes.seed_voken.IBQLoss", None, disc_start=0)
    new = copy.deepcopy(old)
    new["target"] = f"lgvq_plugin.over.{old['target']}"
    new["params"]["lgvq"] = LGVQ
    hosts = [seed_voken.IBQ({"z_channels": 8}, config) for config in (old, new)]
    assert hosts[1].loss.base_loss.disc_weight == hosts[0].loss.disc_weight
