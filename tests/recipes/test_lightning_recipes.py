"""Recipes inside Lightning's Trainer: `ckpt_path` alone resumes, also a model whose shape has changed."""

import pytest
import torch
import torch.nn.functional as F
from recipe_models import MODELS, RECIPES, batch, equal, optimizer_of, ours, values

from glora_kernels.recipes import PRILoRA, lightning_callback

lightning = pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS, SAVED = 12, 6


class Module(lightning.LightningModule):
    def __init__(self, model, recipe=None, optimizers=1):
        super().__init__()
        self.model, self.optimizers_made, self.losses = model, optimizers, []
        self.recipe_of = [recipe]  # in a list: no module of this one
        self.automatic_optimization = optimizers == 1

    def training_step(self, rows, index):
        x, y = rows
        loss = F.cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, rows, index):
        self.model(10 * rows[0])

    def configure_optimizers(self):
        return [optimizer_of(self.model, self.recipe_of[0]) for _ in range(self.optimizers_made)]


def fit(module, callback, folder, accumulated=1, ckpt_path=None, max_steps=STEPS, **options):
    # Two epochs: Lightning begins one anew where a checkpoint is from its middle.
    rows = [(x, y) for step in range(SAVED * accumulated) for x, y in zip(*batch(step), strict=True)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    checkpoint = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
    trainer = lightning.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=False, callbacks=[callback, checkpoint],
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulated,
        val_check_interval=2 * accumulated, num_sanity_val_steps=0, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, loader, torch.utils.data.DataLoader(rows[:8], batch_size=8), ckpt_path=ckpt_path)
    return trainer


def made(name, kind="ours"):
    model = MODELS[kind]()
    recipe = RECIPES[name](model)
    return Module(model, recipe), recipe


@pytest.mark.parametrize(("name", "kind", "accumulated"), [
    ("beam", "ours", 1), ("dynamic", "ours", 2), ("prilora", "ours", 2), ("xgb", "ours", 1), ("chain", "ours", 1),
    ("chain", "all supports", 1), ("chain, base", "accelerated", 1),
])  # fmt: skip
def test_a_run_of_lightning_resumes(name, kind, accumulated, tmp_path):
    module, recipe = made(name, kind)
    fit(module, lightning_callback(recipe), tmp_path / "one", accumulated)
    assert recipe.step == STEPS

    fresh, resumed = made(name, kind)
    checkpoint = tmp_path / "one" / f"step={SAVED}.ckpt"
    fit(fresh, lightning_callback(resumed), tmp_path / "two", accumulated, checkpoint)
    assert fresh.losses == module.losses[SAVED * accumulated :]
    assert equal(values(fresh), values(module))
    assert "on_load_checkpoint" not in vars(fresh), "the module keeps no trace"


def test_lightning_refuses_what_a_recipe_cannot_follow(tmp_path):
    model = ours()
    recipe = PRILoRA(model)
    with pytest.raises(ValueError, match="one optimizer, and there are 2"):
        fit(Module(model, optimizers=2), lightning_callback(recipe), tmp_path)
    fit(Module(model), lightning_callback(recipe), tmp_path, max_steps=2)
    with pytest.raises(RuntimeError, match="at step 0 and the recipe at step 2"):
        fit(Module(model), lightning_callback(recipe), tmp_path)


def test_a_checkpoint_of_lightning_without_a_recipe_is_refused(tmp_path):
    model = ours()
    fit(Module(model), lightning.callbacks.LambdaCallback(), tmp_path)
    fresh = ours()
    with pytest.raises(ValueError, match="no state of a recipe"):
        fit(Module(fresh), lightning_callback(PRILoRA(fresh)), tmp_path, ckpt_path=tmp_path / f"step={SAVED}.ckpt")
