"""A search as a study of Optuna, which is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from glora_kernels.search.results import Finished
from glora_kernels.search.space import genes_of

if TYPE_CHECKING:
    import optuna


def to_study(
    finished: Sequence[Finished],
    genes: Mapping[str, Mapping[str, tuple[Any, ...]]],
    minimize: bool,
    storage: str | optuna.storages.BaseStorage,
    name: str,
) -> optuna.Study:
    """A new study with a trial for each finished candidate. genes: what each layer chooses from, by path."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError("to_optuna needs optuna: pip install 'glora_kernels[search]'") from error
    choices = {
        f"{path}.{gene}": optuna.distributions.CategoricalDistribution(values)
        for path, own in genes.items()
        for gene, values in own.items()
    }
    states = optuna.trial.TrialState
    trials = [
        optuna.create_trial(
            state=states.COMPLETE if done.is_ranked else states.FAIL,
            values=[done.score, done.parameters] if done.score is not None and done.is_ranked else None,
            params={
                f"{path}.{gene}": value
                for path, config in done.candidate.items()
                for gene, value in genes_of(config).items()
            },
            distributions=choices,
            user_attrs={
                "generation": done.generation, "child": done.child, "parameters": done.parameters, "name": done.name,
                "failure": done.failure,
            },
        )
        for done in finished
    ]  # fmt: skip
    directions = ["minimize" if minimize else "maximize", "minimize"]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions)
    study.add_trials(trials)
    return study
