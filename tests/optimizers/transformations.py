"""The transformations of optax that take a gradient, for parameters of some names."""

from typing import Any, NamedTuple

import jax
import optax
from optax import contrib


NAMES = ("current", "resistance", "tau", "gain")

is_even: Any = lambda step: step % 2 == 0


class Row(NamedTuple):
    """A transformation, and whether and why its fit depends on the units without a scale."""

    make: Any
    why: str
    holds_without_scale: bool = False


STEP_IS_ABSOLUTE = "a step has the size of the learning rate, in units of the parameter"
GRADIENT_DESCENT = "a step is a gradient, which has the inverse unit of the parameter"
NORM_MIXES = "a norm adds up parameters of several units"
RELATIVE = "a step is relative to the norm of its own parameter"
LINE_SEARCH = "the first direction of the search is a gradient"

# All of optax that takes a gradient, but for what wants more than one: `sam`, `lookahead`,
# `sophia`, and what takes one for each example. With a scale, all hold, because each sees the
# same numbers in all spellings; without one, only those do whose steps are relative.
TABLE = {
    "adabelief": Row(lambda: optax.adabelief(0.1), STEP_IS_ABSOLUTE),
    "adadelta": Row(lambda: optax.adadelta(1.0), STEP_IS_ABSOLUTE),
    "adafactor": Row(lambda: optax.adafactor(0.1, min_dim_size_to_factor=2), STEP_IS_ABSOLUTE),
    "adagrad": Row(lambda: optax.adagrad(0.1), STEP_IS_ABSOLUTE),
    "adam": Row(lambda: optax.adam(0.1), STEP_IS_ABSOLUTE),
    "adamax": Row(lambda: optax.adamax(0.1), STEP_IS_ABSOLUTE),
    "adamaxw": Row(lambda: optax.adamaxw(0.1, weight_decay=0.1), STEP_IS_ABSOLUTE),
    "adamw": Row(lambda: optax.adamw(0.1, weight_decay=0.1), STEP_IS_ABSOLUTE),
    "adan": Row(lambda: optax.adan(0.1), STEP_IS_ABSOLUTE),
    "amsgrad": Row(lambda: optax.amsgrad(0.1), STEP_IS_ABSOLUTE),
    "fromage": Row(lambda: optax.fromage(0.01), NORM_MIXES),
    "lamb": Row(lambda: optax.lamb(0.1, weight_decay=0.1), STEP_IS_ABSOLUTE),
    "lars": Row(lambda: optax.lars(0.1), RELATIVE, True),
    "lion": Row(lambda: optax.lion(0.1), STEP_IS_ABSOLUTE),
    "lbfgs with zoom line search": Row(lambda: optax.lbfgs(), LINE_SEARCH),
    "lbfgs without": Row(lambda: optax.lbfgs(0.01, linesearch=None), LINE_SEARCH),
    "backtracking line search": Row(
        lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
        LINE_SEARCH,
    ),
    "momentum": Row(lambda: optax.sgd(1e-3, momentum=0.9), GRADIENT_DESCENT),
    "nadam": Row(lambda: optax.nadam(0.1), STEP_IS_ABSOLUTE),
    "nadamw": Row(lambda: optax.nadamw(0.1, weight_decay=0.1), STEP_IS_ABSOLUTE),
    "nesterov": Row(lambda: optax.sgd(1e-3, 0.9, nesterov=True), GRADIENT_DESCENT),
    "noisy_sgd": Row(lambda: optax.noisy_sgd(1e-3, key=jax.random.key(0)), GRADIENT_DESCENT),
    "novograd": Row(lambda: optax.novograd(0.1), STEP_IS_ABSOLUTE),
    "optimistic_gradient_descent": Row(
        lambda: optax.optimistic_gradient_descent(1e-3), GRADIENT_DESCENT
    ),
    "polyak_sgd": Row(lambda: optax.polyak_sgd(1.0), NORM_MIXES),
    "radam": Row(lambda: optax.radam(0.1), STEP_IS_ABSOLUTE),
    "rmsprop": Row(lambda: optax.rmsprop(0.1), STEP_IS_ABSOLUTE),
    "rmsprop, centered": Row(
        lambda: optax.rmsprop(0.1, centered=True, momentum=0.9), STEP_IS_ABSOLUTE
    ),
    "rprop": Row(lambda: optax.rprop(0.1), STEP_IS_ABSOLUTE),
    "sgd": Row(lambda: optax.sgd(1e-3), GRADIENT_DESCENT),
    "sign_sgd": Row(lambda: optax.sign_sgd(0.1), STEP_IS_ABSOLUTE),
    "sm3": Row(lambda: optax.sm3(0.1), STEP_IS_ABSOLUTE),
    "yogi": Row(lambda: optax.yogi(0.1), STEP_IS_ABSOLUTE),
    "adaptive_grad_clip": Row(
        lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(0.1)), GRADIENT_DESCENT
    ),
    "add_decayed_weights": Row(
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-3)), GRADIENT_DESCENT
    ),
    "add_noise": Row(
        lambda: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1e-3)),
        GRADIENT_DESCENT,
    ),
    "apply_every": Row(
        lambda: optax.chain(optax.apply_every(2), optax.sgd(1e-3)), GRADIENT_DESCENT
    ),
    "apply_if_finite": Row(lambda: optax.apply_if_finite(optax.adam(0.1), 3), STEP_IS_ABSOLUTE),
    "centralize": Row(
        lambda: optax.chain(optax.centralize(), optax.sgd(1e-3)), GRADIENT_DESCENT
    ),
    "clip": Row(lambda: optax.chain(optax.clip(1.0), optax.sgd(0.1)), STEP_IS_ABSOLUTE),
    "clip_by_block_rms": Row(
        lambda: optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)), STEP_IS_ABSOLUTE
    ),
    "clip_by_global_norm": Row(
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), NORM_MIXES
    ),
    "conditionally_mask": Row(
        lambda: optax.conditionally_mask(optax.sgd(1e-3), is_even),
        GRADIENT_DESCENT,
    ),
    "conditionally_transform": Row(
        lambda: optax.chain(
            optax.conditionally_transform(optax.scale(0.5), is_even),
            optax.sgd(1e-3),
        ),
        GRADIENT_DESCENT,
    ),
    "ema": Row(lambda: optax.chain(optax.ema(0.9), optax.sgd(1e-3)), GRADIENT_DESCENT),
    "flatten": Row(lambda: optax.flatten(optax.adam(0.1)), STEP_IS_ABSOLUTE),
    "inject_hyperparams": Row(
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1), STEP_IS_ABSOLUTE
    ),
    "keep_params_nonnegative": Row(
        lambda: optax.chain(optax.adam(0.6), optax.keep_params_nonnegative()), STEP_IS_ABSOLUTE
    ),
    "masked": Row(
        lambda: optax.chain(
            optax.masked(optax.adam(0.1), {name: name != "tau" for name in NAMES}),
            optax.masked(optax.scale(1e-4), {name: name == "tau" for name in NAMES}),
        ),
        STEP_IS_ABSOLUTE,
    ),
    "MultiSteps": Row(
        lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
        STEP_IS_ABSOLUTE,
    ),
    "named_chain": Row(
        lambda: optax.named_chain(
            ("adam", optax.scale_by_adam()), ("scale", optax.scale(-0.1))
        ),
        STEP_IS_ABSOLUTE,
    ),
    "normalize_by_update_norm": Row(
        lambda: optax.chain(optax.normalize_by_update_norm(), optax.sgd(0.1)), NORM_MIXES
    ),
    "partition": Row(
        lambda: optax.partition(
            {"fast": optax.adam(0.2), "slow": optax.sgd(1e-3)},
            lambda params: {name: "slow" if name == "tau" else "fast" for name in params},
        ),
        STEP_IS_ABSOLUTE,
    ),
    "schedule": Row(lambda: optax.adam(optax.cosine_decay_schedule(0.2, 4)), STEP_IS_ABSOLUTE),
    "skip_not_finite": Row(
        lambda: optax.MultiSteps(
            optax.adam(0.1), 1, should_skip_update_fn=optax.skip_not_finite
        ).gradient_transformation(),
        STEP_IS_ABSOLUTE,
    ),
    "trace": Row(lambda: optax.chain(optax.trace(0.9), optax.scale(-1e-3)), GRADIENT_DESCENT),
    "zero_nans": Row(lambda: optax.chain(optax.zero_nans(), optax.adam(0.1)), STEP_IS_ABSOLUTE),
}

IS_TAU = {name: name == "tau" for name in NAMES}
CONTRIB = {
    "acprop": Row(lambda: contrib.acprop(0.1), STEP_IS_ABSOLUTE),
    "ademamix": Row(lambda: contrib.ademamix(0.1), STEP_IS_ABSOLUTE),
    "adopt": Row(lambda: contrib.adopt(0.1), STEP_IS_ABSOLUTE),
    "cocob": Row(lambda: contrib.cocob(), STEP_IS_ABSOLUTE),
    "dadapt_adamw": Row(lambda: contrib.dadapt_adamw(1.0), STEP_IS_ABSOLUTE),
    "dog": Row(lambda: contrib.dog(1.0), NORM_MIXES),
    "dowg": Row(lambda: contrib.dowg(1.0), NORM_MIXES),
    "galore": Row(lambda: contrib.galore(0.1), STEP_IS_ABSOLUTE),
    "madgrad": Row(lambda: contrib.madgrad(0.1), STEP_IS_ABSOLUTE),
    "mechanize": Row(lambda: contrib.mechanize(optax.adam(1.0)), STEP_IS_ABSOLUTE),
    "momo": Row(lambda: contrib.momo(1.0), NORM_MIXES),
    "momo_adam": Row(lambda: contrib.momo_adam(0.1), STEP_IS_ABSOLUTE),
    "muon": Row(lambda: contrib.muon(0.1), STEP_IS_ABSOLUTE),
    "normalize": Row(
        lambda: optax.chain(contrib.normalize(), optax.sgd(0.1)), STEP_IS_ABSOLUTE
    ),
    "prodigy": Row(lambda: contrib.prodigy(1.0), STEP_IS_ABSOLUTE),
    "reduce_on_plateau": Row(
        lambda: optax.chain(optax.adam(0.1), contrib.reduce_on_plateau(patience=1)),
        STEP_IS_ABSOLUTE,
    ),
    "schedule_free_adamw": Row(lambda: contrib.schedule_free_adamw(0.1), STEP_IS_ABSOLUTE),
    "schedule_free_sgd": Row(lambda: contrib.schedule_free_sgd(1e-3), GRADIENT_DESCENT),
    "simplified_ademamix": Row(lambda: contrib.simplified_ademamix(0.01), STEP_IS_ABSOLUTE),
}
LATER = {
    "freeze": Row(lambda: optax.chain(optax.adam(0.1), optax.freeze(IS_TAU)), STEP_IS_ABSOLUTE),
    "monitor": Row(
        lambda: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.adam(0.1)),
        STEP_IS_ABSOLUTE,
    ),
    "optimistic_adam_v2": Row(lambda: optax.optimistic_adam_v2(0.1), STEP_IS_ABSOLUTE),
    "selective_transform": Row(
        lambda: optax.selective_transform(optax.adam(0.1), freeze_mask=IS_TAU),
        STEP_IS_ABSOLUTE,
    ),
    "signum": Row(lambda: optax.signum(0.1), STEP_IS_ABSOLUTE),
    "snapshot": Row(
        lambda: optax.chain(optax.snapshot("norm", optax.tree.norm), optax.adam(0.1)),
        STEP_IS_ABSOLUTE,
    ),
}
# Older versions of optax lack some of these.
TABLE |= {name: row for name, row in CONTRIB.items() if hasattr(contrib, name)}
TABLE |= {name: row for name, row in LATER.items() if hasattr(optax, name)}
