"""Gradients of chosen leaves of Equinox models and of vector-valued functions.

Gradients:

    vector_grad        the gradient of the sum of all outputs, which need not be scalars
    grad               the gradient of a function that returns one real scalar
    elementwise_grad   the elementwise derivative, of any order, or an error
    jacrev, jacfwd     the Jacobian, by reverse and by forward mode
    hessian            the second derivatives
    GradientTransform  what these return: a function turned into its gradient
    jit                compiles any function, with little overhead per call

Choosing leaves, by a path such as "layers.*.weight", or with these:

    path               by one of several paths
    instance           under the nodes of a type
    at                 by a function that returns nodes
    leaf               by a predicate on the leaf
    summary            a table of what is chosen and what is frozen
    states             the chosen leaves as a flat dict
    replace_states     a copy with other values at some leaves
    apply_updates      a copy with updates added to some leaves
    State              a named reference to a value, for functions that close over it

Training:

    Optimizer          an optax transformation for the chosen leaves of a module
    StateOptimizer     an optax transformation for states by reference, in place
    partition          an optax transformation for each group of parameters
    unitful            lets an optax transformation optimize parameters with units
    train_step         creates a compiled training step
    TrainStep          what `train_step` returns
    TrainState         model, optimizer and key between two steps
    Metrics            value, auxiliary data and norms of a step
    grad_norms         the norm of each gradient, by its path
    plot_grad_norms    draws these norms as a heat map of path against step
    save, load         write and read all arrays of a pytree, by name

`help(vg.vector_grad)` explains the options that all gradients share.
"""

from importlib.metadata import version as _version

from ._checkpoints.checkpoint import load, save
from ._gradients.elementwise import elementwise_grad
from ._gradients.engine import GradientTransform
from ._gradients.operators import grad, hessian, jacfwd, jacrev, vector_grad
from ._jit.jit import jit
from ._optimizers.norms import grad_norms, plot_grad_norms
from ._optimizers.optimizer import Optimizer
from ._optimizers.partition import partition
from ._optimizers.state_optimizer import StateOptimizer
from ._optimizers.unitful import unitful
from ._select.selectors import at, instance, leaf, path
from ._select.states import apply_updates, replace_states, states
from ._select.summary import summary
from ._training.flat_step import Metrics
from ._training.train_state import TrainState
from ._training.train_step import train_step, TrainStep
from ._tree.state import State


__all__ = [
    "GradientTransform",
    "Metrics",
    "Optimizer",
    "State",
    "StateOptimizer",
    "TrainState",
    "TrainStep",
    "apply_updates",
    "at",
    "elementwise_grad",
    "grad",
    "grad_norms",
    "hessian",
    "instance",
    "jacfwd",
    "jacrev",
    "jit",
    "leaf",
    "load",
    "partition",
    "path",
    "plot_grad_norms",
    "replace_states",
    "save",
    "states",
    "summary",
    "train_step",
    "unitful",
    "vector_grad",
]

__version__ = _version("vgrad_eqx")
