"""The networks: a spec is data, its attention graph is the program.

Shape letters, one legend for the folder: B batch, T tokens, D width, N query heads, G key/value heads, H head dim,
L layers, C chunk steps, A action dim, S state dim, V views. Flow time t: 0 is noise, 1 is data.
"""

from .graph import Graph
from .inputs import Inputs, Outputs
from .model import Model, build
from .spec import Spec, load_spec

__all__ = ["Graph", "Inputs", "Model", "Outputs", "Spec", "build", "load_spec"]
