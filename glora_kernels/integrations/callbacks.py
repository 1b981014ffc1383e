"""Anything that acts after optimizer steps, as a callback of the trainers: transformers' and Lightning's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

FILE = "recipe.safetensors"
"""What a transformers checkpoint folder holds of it."""


class Acts(Protocol):
    """What a callback needs of a recipe."""

    step: int

    def bind(self, optimizer: Any) -> None: ...
    def after_step(self, step: int | None = None) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any) -> None: ...
    def save(self, path: Any) -> None: ...
    def load(self, path: Any) -> None: ...


def trainer_callback(recipe: Acts) -> Any:
    """A `transformers.TrainerCallback` that runs the recipe after each optimizer step, and saves it in checkpoints.

    To go on from a checkpoint, bring the model to its shape before the Trainer loads it:

        callback = trainer_callback(recipe)
        callback.resume(checkpoint)
        trainer.train(resume_from_checkpoint=checkpoint)

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    class RecipeCallback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != recipe.step:
                raise RuntimeError(
                    f"the Trainer is at step {state.global_step} and the recipe at step {recipe.step}: call "
                    "callback.resume(checkpoint) before trainer.train(resume_from_checkpoint=checkpoint), or begin "
                    "with a new recipe"
                )
            recipe.bind(kwargs["optimizer"])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            recipe.after_step(state.global_step)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.is_world_process_zero:
                recipe.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

        def resume(self, checkpoint: str | os.PathLike[str]) -> None:
            """Bring the model and the recipe to where a checkpoint was saved."""
            recipe.load(Path(checkpoint) / FILE)

    return RecipeCallback()


def lightning_callback(recipe: Acts) -> Any:
    """A Lightning `Callback` that runs the recipe after each optimizer step, and saves it in checkpoints.

    `trainer.fit(..., ckpt_path=...)` resumes: the model gets the checkpoint's shape before Lightning loads it.

    Raises:
        ImportError: Lightning is not installed.
    """
    from lightning.pytorch import Callback

    class RecipeCallback(Callback):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage == "fit":  # the module's own hook is the only one that runs before its weights are loaded
                before = pl_module.on_load_checkpoint

                def load(checkpoint: dict[str, Any]) -> None:
                    if (state := checkpoint.get("callbacks", {}).get(self.state_key)) is None:
                        raise ValueError(
                            "the checkpoint holds no state of a recipe: it was saved without this callback"
                        )
                    recipe.load_state_dict(state)
                    before(checkpoint)

                pl_module.on_load_checkpoint = load

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            vars(pl_module).pop("on_load_checkpoint", None)
            if len(trainer.optimizers) != 1:
                raise ValueError(
                    f"a recipe acts after the steps of one optimizer, and there are {len(trainer.optimizers)}"
                )
            if trainer.global_step != recipe.step:
                raise RuntimeError(
                    f"the Trainer is at step {trainer.global_step} and the recipe at step {recipe.step}: resume with "
                    "trainer.fit(ckpt_path=...), or begin with a new recipe"
                )
            recipe.bind(trainer.optimizers[0])

        def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step > recipe.step:  # not in the middle of an accumulation
                recipe.after_step(trainer.global_step)

        def state_dict(self) -> dict[str, Any]:
            return recipe.state_dict()

    return RecipeCallback()
