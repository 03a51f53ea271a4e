"""Gradients of chosen leaves of Equinox models and of vector-valued functions."""

from importlib.metadata import version as _version

from ._checkpoint import load as load
from ._checkpoint import save as save
from ._elementwise import elementwise_grad as elementwise_grad
from ._jacobians import hessian as hessian
from ._jacobians import jacfwd as jacfwd
from ._jacobians import jacrev as jacrev
from ._jit import jit as jit
from ._norms import grad_norms as grad_norms
from ._norms import plot_grad_norms as plot_grad_norms
from ._operators import grad as grad
from ._operators import vector_grad as vector_grad
from ._optimizer import Optimizer as Optimizer
from ._plan import Metrics as Metrics
from ._selectors import at as at
from ._selectors import instance as instance
from ._selectors import leaf as leaf
from ._selectors import path as path
from ._state import State as State
from ._state_optimizer import StateOptimizer as StateOptimizer
from ._states import apply_updates as apply_updates
from ._states import replace_states as replace_states
from ._states import states as states
from ._summary import summary as summary
from ._train import train_step as train_step
from ._train_state import TrainState as TrainState
from ._train_step import TrainStep as TrainStep
from ._transform import GradientTransform as GradientTransform
from ._unitful import unitful as unitful


__version__ = _version("vgrad_eqx")
