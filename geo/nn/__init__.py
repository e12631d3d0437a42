"""Layers: equivariant and permutation-equivariant modules, one family a file.

:mod:`geo.nn.aggr`, `GauntConv`, `GPSGlobalConv`, `GINE` and `MonoidAggregation` are imported on first use: PyG, on
which they build, takes longer to import than all the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from geo.nn.frame_conv import SE2Conv, SE3Conv
from geo.nn.gated_gcn import GatedGCN
from geo.nn.gated_gcn_conv import GatedGCNConv
from geo.nn.gaunt import GauntTensorProduct, as_e3nn
from geo.nn.gaunt_power import GauntPower
from geo.nn.grf_linear_attention import GRFLinearAttention
from geo.nn.kernel_basis import KernelBasis
from geo.nn.learnable_modulation import LearnableModulation
from geo.nn.mamba import BiMamba, SelectiveSSM
from geo.nn.monoids import (
    BinaryGRU,
    CircularConv,
    ElementwiseMonoid,
    KSmallest,
    LogSumExp,
    Monoid,
    ProductMonoid,
    SymmetricMLP,
    TransportedSum,
)
from geo.nn.node_order import NodeOrder
from geo.nn.orientation_grid import FrameGrid, OrientationGrid
from geo.nn.ponita import PONITA
from geo.nn.se_conv import ConvNeXtBlock, PointConv, PoniConv
from geo.nn.sign_net import EigenvectorPE, SignNet
from geo.nn.spe import SPE
from geo.nn.spectrum import pad_spectrum
from geo.nn.tensor_product_conv import TensorProductConv
from geo.nn.token_encoder import MPNNTokenEncoder, RWFTokenEncoder

if TYPE_CHECKING:
    from typing import Any

    from geo.nn import aggr
    from geo.nn.aggr import (
        MaxAggregation,
        MeanAggregation,
        MinAggregation,
        MulAggregation,
        MultiAggregation,
        SoftmaxAggregation,
        StdAggregation,
        SumAggregation,
        VarAggregation,
    )
    from geo.nn.gaunt_conv import GauntConv
    from geo.nn.gine import GINE
    from geo.nn.gps_conv import GPSGlobalConv, GPSMambaConv
    from geo.nn.graph_mamba import GraphMamba
    from geo.nn.monoid_aggregation import (
        MonoidAggregation,
        associativity_loss,
        from_pyg_lcm,
        identity_loss,
        order_sensitivity,
        to_pyg_lcm,
    )

__all__ = [
    "GINE",
    "GRFLinearAttention",
    "PONITA",
    "BiMamba",
    "BinaryGRU",
    "CircularConv",
    "ConvNeXtBlock",
    "EigenvectorPE",
    "ElementwiseMonoid",
    "FrameGrid",
    "GPSGlobalConv",
    "GPSMambaConv",
    "GatedGCN",
    "GatedGCNConv",
    "GauntConv",
    "GauntPower",
    "GauntTensorProduct",
    "GraphMamba",
    "KSmallest",
    "KernelBasis",
    "LearnableModulation",
    "LogSumExp",
    "MaxAggregation",
    "MPNNTokenEncoder",
    "MeanAggregation",
    "MinAggregation",
    "Monoid",
    "MonoidAggregation",
    "MulAggregation",
    "MultiAggregation",
    "NodeOrder",
    "OrientationGrid",
    "PointConv",
    "PoniConv",
    "ProductMonoid",
    "RWFTokenEncoder",
    "SE2Conv",
    "SE3Conv",
    "SPE",
    "SelectiveSSM",
    "SignNet",
    "SoftmaxAggregation",
    "StdAggregation",
    "SumAggregation",
    "SymmetricMLP",
    "TensorProductConv",
    "TransportedSum",
    "VarAggregation",
    "aggr",
    "as_e3nn",
    "associativity_loss",
    "from_pyg_lcm",
    "identity_loss",
    "order_sensitivity",
    "pad_spectrum",
    "to_pyg_lcm",
]

_LAZY = {
    "GINE": "geo.nn.gine",
    "GPSGlobalConv": "geo.nn.gps_conv",
    "GPSMambaConv": "geo.nn.gps_conv",
    "GauntConv": "geo.nn.gaunt_conv",
    "GraphMamba": "geo.nn.graph_mamba",
    "MonoidAggregation": "geo.nn.monoid_aggregation",
    "associativity_loss": "geo.nn.monoid_aggregation",
    "from_pyg_lcm": "geo.nn.monoid_aggregation",
    "identity_loss": "geo.nn.monoid_aggregation",
    "order_sensitivity": "geo.nn.monoid_aggregation",
    "to_pyg_lcm": "geo.nn.monoid_aggregation",
}


def __getattr__(name: str) -> Any:
    if name == "aggr":
        return importlib.import_module("geo.nn.aggr")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in __all__:
        return getattr(importlib.import_module("geo.nn.aggr"), name)
    raise AttributeError(f"module 'geo.nn' has no attribute {name!r}")
