"""Gradients of chosen leaves of Equinox models and of vector-valued functions."""

from importlib.metadata import version as _version

from ._operators import vector_grad as vector_grad
from ._selectors import at as at
from ._selectors import instance as instance
from ._selectors import leaf as leaf
from ._selectors import path as path
from ._state import State as State
from ._states import apply_updates as apply_updates
from ._states import replace_states as replace_states
from ._states import states as states
from ._summary import summary as summary
from ._transform import GradientTransform as GradientTransform
from ._unitful import unitful as unitful


__version__ = _version("vgrad_eqx")
