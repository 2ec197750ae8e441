"""Balancers: put every teacher's features on one scale, once, before the student learns them. `phi_s.py` is the default."""

from .balancer import Balancer, check_balancers, identity, load_balancers, name_of, save_balancers
from .dispersion import Dispersion
from .methods import fit, fit_on_first_rank
from .moments import Moments

__all__ = [
    "Balancer",
    "Dispersion",
    "Moments",
    "check_balancers",
    "fit",
    "fit_on_first_rank",
    "identity",
    "load_balancers",
    "name_of",
    "save_balancers",
]
