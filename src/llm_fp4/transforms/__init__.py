"""Changes that keep a model's float function: rotation and folded norms, applied to tensors as they are read; maps of inputs."""

from llm_fp4.transforms.inputs import HadamardTransform, InputTransform, KroneckerTransform
from llm_fp4.transforms.merge import Merge
from llm_fp4.transforms.roles import BlockRoles, block_roles, norm_before
from llm_fp4.transforms.rotation import Rotation
from llm_fp4.transforms.soft import SoftInput, SoftLinear, soft_blocks
from llm_fp4.transforms.soft_rounding import SoftRoundedLinear, SoftSite

__all__ = [
    "BlockRoles", "HadamardTransform", "InputTransform", "KroneckerTransform", "Merge", "Rotation", "SoftInput", "SoftLinear",
    "SoftRoundedLinear", "SoftSite", "block_roles", "norm_before", "soft_blocks",
]  # fmt: skip
