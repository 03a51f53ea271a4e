"""Gradients of chosen leaves of Equinox models and of vector-valued functions."""

from importlib.metadata import version as _version

from ._checkpoints.checkpoint import load as load
from ._checkpoints.checkpoint import save as save
from ._gradients.elementwise import elementwise_grad as elementwise_grad
from ._gradients.engine import GradientTransform as GradientTransform
from ._gradients.operators import grad as grad
from ._gradients.operators import hessian as hessian
from ._gradients.operators import jacfwd as jacfwd
from ._gradients.operators import jacrev as jacrev
from ._gradients.operators import vector_grad as vector_grad
from ._jit.jit import jit as jit
from ._optimizers.norms import grad_norms as grad_norms
from ._optimizers.norms import plot_grad_norms as plot_grad_norms
from ._optimizers.optimizer import Optimizer as Optimizer
from ._optimizers.partition import partition as partition
from ._optimizers.state_optimizer import StateOptimizer as StateOptimizer
from ._optimizers.unitful import unitful as unitful
from ._select.selectors import at as at
from ._select.selectors import instance as instance
from ._select.selectors import leaf as leaf
from ._select.selectors import path as path
from ._select.states import apply_updates as apply_updates
from ._select.states import replace_states as replace_states
from ._select.states import states as states
from ._select.summary import summary as summary
from ._training.flat_step import Metrics as Metrics
from ._training.train_state import TrainState as TrainState
from ._training.train_step import train_step as train_step
from ._training.train_step import TrainStep as TrainStep
from ._tree.state import State as State


__version__ = _version("vgrad_eqx")
